"""One file a command of the `cnnfast` command line."""
