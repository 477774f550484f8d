"""How README.md is made from index.ipynb: `jupyter nbconvert --config nbs/readme.py` in the repository's root (`make readme`).

The notebook lies in nbs/ and README.md at the root, so links that begin with `../` lose that. Code cells tagged `hide` show
only what they print.
"""
from nbconvert.preprocessors import Preprocessor


class FromRoot(Preprocessor):
    "Rewrite links, drop the code of cells tagged `hide`, and name the language of the others."
    def preprocess(self, nb, resources):
        nb.metadata["language_info"] = {"name": "python"}
        return super().preprocess(nb, resources)

    def preprocess_cell(self, cell, resources, index):
        if cell.cell_type == "markdown": cell.source = cell.source.replace("](../", "](")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "text/markdown" in data: output.data = {"text/markdown": data["text/markdown"].replace("](../", "](")}
        if "hide" in cell.metadata.get("tags", ()): cell.metadata["transient"] = {"remove_source": True}
        return cell, resources


c = get_config()  # noqa: F821  nbconvert defines it
c.NbConvertApp.notebooks = ["nbs/index.ipynb"]
c.NbConvertApp.export_format = "markdown"
c.NbConvertApp.output_base = "README"
c.NbConvertApp.log_level = "WARN"
c.FilesWriter.build_directory = "."
c.MarkdownExporter.preprocessors = [FromRoot]
