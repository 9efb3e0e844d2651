"Sphinx settings of the documentation site; `tools/docs.py` calls Sphinx with them."

from pathlib import Path

from derived import settings

cfg = settings()
project, author, copyright, release = cfg["title"], cfg["author"], cfg["copyright"], cfg["version"]

extensions = ["myst_nb", "sphinxcontrib.katex"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_code_prompt_show = "Code"
nb_code_prompt_hide = "Hide code"
nb_render_markdown_format = "myst"
nb_mime_priority_overrides = [("html", "text/markdown", 5)]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = project
html_show_sphinx = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["zoo.js", "copy.js", "tables.js"]
html_search_scorer = str(Path(__file__).with_name("scorer.js"))
html_show_search_summary = False  # a search would load every page that it finds
html_favicon = "static/favicon.svg"
html_theme_options = {
    "source_repository": cfg["git_url"],
    "source_branch": cfg["branch"],
    "source_directory": f"{cfg['nbs_path']}/",
}

# KaTeX comes with the extension and writes MathML; `docs.py` adds the font of formulas.
html_math_renderer = "katex"
katex_css_path = "site.css"
katex_options = 'output: "mathml"'
