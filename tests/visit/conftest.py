"""What stands in ci/ is imported from the root of the repository."""

import sys

from visits import REPOSITORY

if str(REPOSITORY) not in sys.path:
    sys.path.append(str(REPOSITORY))
