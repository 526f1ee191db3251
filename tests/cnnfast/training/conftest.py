"""What the tests of training share."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning", reason="training needs lightning")
