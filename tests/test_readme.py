"""Every python block of README.md and docs/*.md runs, in order, in one namespace per file and in an empty folder.

The pages may name real models of the Hub: for those in `HUB` the folder holds a tiny model of the same family under
that very name, so `from_pretrained("org/name")` finds it without a network. A block is left out only by a comment on
the line above it, <!-- skip: why -->. A failure points at the line of the page. It knows nothing of what pages say.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pages import blocks
from tiny_vision import PROCESSOR
from torchvision_stub import import_timm
from zoo import ZOO, tokenizer_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DESIGN = ROOT / "docs" / "design.md"
PACKAGE = ROOT / "src" / "kitout"
PAGES = [README, *sorted((ROOT / "docs").glob("**/*.md"))]
# their Python needs their commands: tests/test_journeys.py
JOURNEYS = ("align.md", "chat.md", "compare-methods.md", "tickets.md")

HUB = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "llama-tied",
    "HuggingFaceTB/SmolLM2-135M": "llama-tied",
    "meta-llama/Llama-3.2-1B": "llama",
    "Qwen/Qwen3-0.6B": "qwen3",
    "openai-community/gpt2": "gpt2",
    "EleutherAI/pythia-70m": "gpt-neox",
    "google-bert/bert-base-uncased": "bert",
    "FacebookAI/roberta-base": "roberta",
    "google-t5/t5-small": "t5",
    "facebook/bart-base": "bart",
    "google/vit-base-patch16-224": "vit",
    "facebook/dinov2-small": "dinov2",
    "facebook/dinov2-base": "dinov2",
    "microsoft/swin-tiny-patch4-window7-224": "swin",
}


def furnish(folder: Path, text: str) -> None:
    """Tiny models in place of the Hub's, for those the page names; timm importable if the page wants it."""
    for name, species in HUB.items():
        if re.search(rf"{re.escape(name)}(?![\w.-])", text):
            specimen = ZOO[species]
            specimen.build().save_pretrained(folder / name)
            if specimen.is_text:
                tokenizer_of(specimen).save_pretrained(folder / name)
            else:
                PROCESSOR.save_pretrained(folder / name)
    if re.search(r"\btimm\b", text):
        import_timm()


def run(page: Path, text: str, namespace: dict[str, Any]) -> int:
    """Executes the page's blocks; how many ran. Line numbers are those of the page, in tracebacks too."""
    ran = 0
    for block in blocks(text):
        if block.skip is not None:
            assert len(block.skip) >= 10, f"{page.name}:{block.line}: say why the block is skipped"
            continue
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
        ran += 1
    return ran


def test_there_is_a_readme_with_code_that_runs() -> None:
    assert README.is_file(), "README.md is missing: it is the first thing a user and these tests read"
    assert any(block.skip is None for block in blocks(README.read_text(encoding="utf-8"))), "README.md runs no python"


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them in links."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES[1:], *sorted(ROOT.glob("*.md"))], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_on_the_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("path", re.findall(r"`([\w/]+(?:\.py|/))`", DESIGN.read_text(encoding="utf-8")))
def test_the_design_names_files_that_exist(path: str) -> None:
    folders = [ROOT, PACKAGE, *(folder for folder in PACKAGE.rglob("*") if folder.is_dir())]
    assert any((folder / path).exists() for folder in folders), f"docs/design.md names {path}"


def test_the_tree_of_the_readme_has_every_folder() -> None:
    tree = README.read_text(encoding="utf-8").split("\nsrc/kitout/\n")[1].split("\ntests/")[0]
    described: list[Path] = []
    for indent, name, phrase in re.findall(r"^( +)(\w+)/ +(.*)$", tree, flags=re.MULTILINE):
        assert phrase, name
        described.append(Path(name) if len(indent) == 2 else Path(described[-1].parts[0], name))
    folders = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("__init__.py")} - {Path()}
    assert set(described) == folders


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in JOURNEYS], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert page.is_file(), f"{page.name} is missing"
    text = page.read_text(encoding="utf-8")
    furnish(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    run(page, text, {"__name__": "__main__"})


PAGE = """
# A page
```python
x = 1
```
<!-- skip: needs a GPU of 80 GB -->
```python
raise RuntimeError
```
1. In a list
   ```py
   y = x + 1
   ```
```bash
not python
```
"""


def test_the_reader_of_pages() -> None:
    assert [(b.line, b.skip) for b in blocks(PAGE)] == [(4, None), (8, "needs a GPU of 80 GB"), (12, None)]
    namespace: dict[str, Any] = {}
    assert run(Path("page.md"), PAGE, namespace) == 2
    assert namespace["y"] == 2


def test_a_failure_points_at_the_line_of_the_page() -> None:
    with pytest.raises(NameError) as failure:
        run(Path("page.md"), "text\n\n```python\nok = 1\nmissing\n```\n", {})
    assert failure.traceback[-1].lineno + 1 == 5


def test_a_skip_must_be_argued() -> None:
    with pytest.raises(AssertionError, match=r"page\.md:3"):
        run(Path("page.md"), "<!-- skip: -->\n```python\n1 / 0\n```\n", {})


def test_models_of_the_hub_are_found_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct"), from_pretrained("facebook/dinov2-small"), timm'
    furnish(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    page = """```python
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
text = tokenizer.decode(model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=3)[0])
vision = AutoModelForImageClassification.from_pretrained("facebook/dinov2-small")
import timm
```"""
    namespace: dict[str, Any] = {}
    run(Path("page.md"), page, namespace)
    assert namespace["text"].startswith("Hello")
    assert not (tmp_path / "HuggingFaceTB/SmolLM2-135M").exists()


def test_troubleshooting_quotes_messages_that_exist() -> None:
    """A part of each quoted message, between its dots, stands in the sources as it is."""
    source = re.sub(r'"\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    first_cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert first_cells
    for cell in first_cells:
        for quoted in re.findall(r"`([^`]+)`", cell):
            pieces = [piece for piece in re.split(r"\s*\.\.\.\s*", quoted) if len(piece) > 8]
            if "element 0" not in quoted:  # torch's own
                assert any(piece in source for piece in pieces), quoted
