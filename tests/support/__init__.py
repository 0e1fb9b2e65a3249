"""What test files share; pytest finds it on its pythonpath."""

import pkgutil

import pytest

pytest.register_assert_rewrite(
    *(module.name for module in pkgutil.iter_modules(__path__, "support."))
)
