"""The first question to a GPU: does each kernel run there at all, end, and compute right numbers? One process for each
family.
"""
