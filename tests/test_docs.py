"The site builds without running anything, has a page for every notebook, and its pages ask the network for nothing."
import re, subprocess, sys
from conftest import ROOT
from test_workbook import NOTEBOOKS, name


def test_site(tmp_path):
    code = "import sys; sys.path[:0] = sys.argv[1:3]; from pathlib import Path; import docs; sys.exit(docs.build(Path(sys.argv[3])))"
    run = subprocess.run([sys.executable, "-c", code, ROOT, ROOT/"tools", tmp_path], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not run.returncode, run.stdout[-2000:]
    print(run.stdout)
    pages = {str(p.relative_to(tmp_path/"html")): p.read_text() for p in (tmp_path/"html").rglob("*.html")}
    assert not {name(n) for n in NOTEBOOKS if name(n).replace(".ipynb", ".html") not in pages}
    assert not {p for p, text in pages.items() if re.search(r"""(src=|<link[^>]+stylesheet[^>]+href=)["']https?:""", text)}
    assert not {p for p, text in pages.items() if re.search(r"#\| *(export|hide|default_exp)\b", text) and not p.startswith("CONTRIBUTING")}
