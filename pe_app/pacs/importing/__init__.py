"""DICOM from discs, archives and folders into a folder of studies that the server offers."""

from pe_app.pacs.importing.pseudonyms import Pseudonyms, read_key
from pe_app.pacs.importing.run import COLUMNS, ImportLine, ImportSettings, Names, import_studies

__all__ = ["COLUMNS", "ImportLine", "ImportSettings", "Names", "Pseudonyms", "import_studies", "read_key"]
