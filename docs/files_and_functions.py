"""Documents a function, such as `vernal.paths`, whose file has the same name."""

from typing import Any

import griffe


class FilesAndFunctions(griffe.Extension):
    """Points a public name at the function, where Griffe found the file.

    `from .paths import paths` in the `__init__` of a folder hides the file from Python,
    which runs the statement. To Griffe, which does not, the file hides the function.
    """

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Looks at each name that the package takes from one of its folders."""
        for name, member in pkg.members.items():
            if member.is_alias and member.target_path.startswith(f"{pkg.path}."):
                found = pkg[member.target_path.removeprefix(f"{pkg.path}.")]
                if not found.is_alias and found.is_module and name in found.members:
                    member.target_path += f".{name}"
