"""Rules of the house that a program can check: imports, docstrings, commands in the README that must parse."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import convert_checkpoint
import evaluate_fid
import sample
from iwin_dit.training.config import parse_config
from tests.tools import fenced

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "iwin_dit"
SCRIPTS = sorted(ROOT.glob("*.py"))

# What each part may import besides itself; nothing points upwards, nothing imports a script.
ALLOWED = {
    "nn": set(),
    "models": {"nn"},
    "data": set(),
    "diffusion": set(),
    "metrics": set(),
    "evaluation": {"metrics", "pipelines", "data", "charts"},
    "charts": set(),
    "pipelines": {"models", "nn", "data"},
    "convert": {"models", "nn"},
    "training": {"models", "pipelines", "diffusion", "data", "metrics", "evaluation", "charts"},
    "__init__": {"models", "nn", "pipelines"},
    "files": set(),  # which all of them may import, as
    "threads": set(),
}
WITHIN_NN = {
    "windows": set(),
    "conv": {"windows"},
    "embeddings": {"windows"},
    "attention": {"windows"},
    "blocks": {"attention", "conv", "windows"},
    "__init__": {"attention", "blocks", "conv", "embeddings"},
}
# Third-party packages that only these files may import.
CONFINED = {
    "accelerate": r"training/.*|train_dit|extract_latents|evaluate_fid",
    "sklearn": r"data/digits",
    "datasets": r"data/huggingface",
    "matplotlib": r"charts",
    "torch_fidelity": r"metrics/two_sample",
    "cleanfid": r"metrics/inception",
    "transformers": r"metrics/dinov2",
    "av": r"data/videos",
    "torchmetrics": r"never",
    "pytorch_fid": r"metrics/inception",
    "peft": r"never",
    "triton": r"nn/kernels/.*",
    "tensorboard": r"never",
    "wandb": r"never",
}
METRICS_MAY_IMPORT = {
    *("torch", "numpy", "PIL", "safetensors", "huggingface_hub"),
    *("pytorch_fid", "torch_fidelity", "cleanfid", "transformers"),
}


def imported_modules(path: Path) -> list[str]:
    """Dotted names of everything a file imports, at any depth, relative ones resolved."""
    relative = path.relative_to(ROOT).with_suffix("").parts
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(relative[: -node.level]) + "." if node.level else ""
            base = parent + (node.module or "")
            names += [base.rstrip(".")] if node.module else [base + alias.name for alias in node.names]
    return names


@pytest.mark.parametrize("path", [*sorted(PACKAGE.rglob("*.py")), *SCRIPTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    relative = path.relative_to(ROOT).with_suffix("")
    modules = imported_modules(path)
    scripts = {script.stem for script in SCRIPTS}
    assert not scripts & {module.split(".")[0] for module in modules}
    for package, where in CONFINED.items():
        if any(module.split(".")[0] == package for module in modules):
            assert re.fullmatch(where, str(relative).removeprefix("iwin_dit/")), f"{relative} must not import {package}"
    if relative.parts[0] != "iwin_dit":
        return
    part = relative.parts[1]
    ours = [module.split(".") for module in modules if module.split(".")[0] == "iwin_dit"]
    siblings = {parts[1] for parts in ours if len(parts) > 1} - {part, "files", "threads"}
    assert siblings <= ALLOWED[part], f"{relative} imports {siblings - ALLOWED[part]}"
    if part == "nn" and len(relative.parts) == 3:
        within = {parts[2] for parts in ours if len(parts) > 2}
        assert within <= WITHIN_NN[relative.parts[2]]
        third = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"iwin_dit"}
        assert third <= ({"torch", "diffusers"} if relative.parts[2] == "attention" else {"torch"})
    if part == "metrics":
        third = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"iwin_dit"}
        assert third <= METRICS_MAY_IMPORT
    if part == "pipelines":
        assert {tuple(parts[1:3]) for parts in ours if parts[1] == "data"} <= {("data", "codec")}


def test_only_scripts_compile():
    for path in PACKAGE.rglob("*.py"):
        assert "torch.compile" not in path.read_text(), path


@pytest.mark.slow
def test_importing_the_package_is_light():
    """`import iwin_dit` adds neither training, metrics nor an optional package to what diffusers loads anyway."""
    heavy = (
        "sklearn",
        "matplotlib",
        "torch_fidelity",
        "pytorch_fid",
        "av",
        "jsonargparse",
        "torchvision",
        "accelerate",
    )
    ours = ("iwin_dit.training", "iwin_dit.evaluation", "iwin_dit.metrics", "iwin_dit.convert")
    code = (
        "import sys; from diffusers import ModelMixin, DiffusionPipeline; before = set(sys.modules); import iwin_dit;"
        f"print([m for m in set(sys.modules) - before if m.split('.')[0] in {heavy} or m.startswith({ours})])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_long_docstrings_list_the_arguments(path):
    """ruff compares an Args section with the signature; this asks that public functions with more to say have one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node) or ""
        arguments = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
        if "\n" in docstring and arguments:
            assert "Args:" in docstring, f"{path.name}: {node.name}"


# --- the README's and the docs' commands


def shell_commands(path: Path) -> list[list[str]]:
    """Commands of the bash blocks that run one of our scripts, without launcher and comments."""
    commands = []
    for line in fenced(path, "bash").replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if word in {script.name for script in SCRIPTS}:
                commands.append(words[i:])
    return commands


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [command for page in PAGES for command in shell_commands(page)]


def test_the_readme_shows_every_script():
    shown = {command[0] for command in shell_commands(ROOT / "README.md")}
    assert shown == {script.name for script in SCRIPTS}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_parse(command, tmp_path, monkeypatch):
    script, *arguments = command
    if script in ("train_dit.py", "extract_latents.py"):
        monkeypatch.chdir(ROOT)
        parse_config(arguments, default_config="configs/digits.yaml")
    elif script == "sample.py":
        sample.build_parser().parse_args(arguments)
    elif script == "convert_checkpoint.py":
        convert_checkpoint.build_parser().parse_args(arguments)
    else:
        monkeypatch.chdir(tmp_path)
        evaluate_fid.parse_arguments(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", fenced(page, "bash"), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_windows_page_runs():
    exec(compile(fenced(ROOT / "docs" / "windows.md", "python"), "docs/windows.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(("text", "seeds"), [("5", [5]), ("0-3", [0, 1, 2, 3]), ("0-1,8,10-11", [0, 1, 8, 10, 11])])
def test_seed_ranges(text, seeds):
    assert sample.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["a", "3-", "-3", "5-2"])
def test_mistaken_seeds(text):
    with pytest.raises(argparse.ArgumentTypeError):
        sample.parse_seeds(text)
