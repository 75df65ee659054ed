"""Names of the files that surgery adds to an output folder."""

from __future__ import annotations

from typing import Final

MANIFEST_NAME: Final = "surgery.json"
MAPPING_NAME: Final = "expert_mapping.json"
README_NAME: Final = "README.md"
SOURCE_README_NAME: Final = "README.source.md"
