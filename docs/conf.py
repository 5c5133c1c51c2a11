import importlib.metadata
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent / "ext"))

project = "jaxbnb"
release = importlib.metadata.version("jaxbnb")
extensions = [
    "coverage_check",
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "tidy",
    "which_models",
]
exclude_patterns = ["_build"]
# The build fails if a public name of these modules is not documented.
coverage_check_modules = [
    "jaxbnb",
    "jaxbnb.convert",
    "jaxbnb.core",
    "jaxbnb.data",
    "jaxbnb.equinox",
    "jaxbnb.finetune",
    "jaxbnb.planning",
    "jaxbnb.sharding",
    "jaxbnb.linen",
    "jaxbnb.keras",
    "jaxbnb.lora",
    "jaxbnb.models",
    "jaxbnb.nnx",
    "jaxbnb.optim",
]

html_theme = "sphinx_book_theme"
html_title = f"jaxbnb {release}"
html_static_path = ["_static"]
html_css_files = ["jaxbnb.css"]
html_copy_source = False
html_theme_options = {
    "footer_content_items": [],
    "navbar_persistent": [],
    "show_toc_level": 2,
    "use_download_button": False,
}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "py:obj"
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 72

copybutton_prompt_is_regexp = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
