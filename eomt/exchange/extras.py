"""Packages that only some files need, and the extra of this project that installs them."""

import importlib.util


def require(extra: str, what: str, *packages: str) -> None:
    """Raises ImportError, naming the extra to install, where one of these packages is missing; imports none of them.

    Args:
        extra: of pyproject.toml. what: needs the packages.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{what} needs {" and ".join(missing)}: pip install "eomt-lora[{extra}]"')
