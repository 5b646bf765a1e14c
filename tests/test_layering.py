"""The house's import direction, and a few bans, read from the source alone.

`violations` is the checker; the tests below the first two show that it can fail.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mv2v_engine"

# From the bottom up; a unit imports units of lower layers.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "arguments",
            "config",
            "defaults",
            "envs",
            "errors",
            "files",
            "locks",
            "parser",
            "progress",
            "settings",
            "shapes",
            "testing",
        }
    ),
    frozenset({"ops"}),
    frozenset({"finite"}),
    # siblings: engine joins them
    frozenset(
        {
            "sampling",
            "video",
            "vae",
            "image",
            "text",
            "vision",
            "counting",
            "camera",
            "memory",
            "tokens",
            "models",
            "parallel",
            "checkpoints",
        }
    ),
    frozenset({"synthetic"}),
    frozenset({"engine"}),
    frozenset({"__init__"}),
    frozenset({"machine", "terminal", "options", "catalogue"}),
    frozenset({"serving", "training", "evaluation", "turns", "streams", "client"}),
    frozenset({"run"}),
)
LAYER_OF = {unit: depth for depth, layer in enumerate(LAYERS) for unit in layer}
# Within a layer, only these; the bottom layer is free.
SIDEWAYS = {
    ("models", "tokens"),
    ("models", "parallel"),
    ("parallel", "tokens"),
    ("memory", "tokens"),
    ("memory", "camera"),
    ("checkpoints", "models"),
    ("checkpoints", "tokens"),  # what models are made of
    ("vae", "models"),
    ("vae", "checkpoints"),  # weight files and their names
    ("counting", "vae"),  # whose bytes are counted
    ("counting", "models"),
    ("image", "checkpoints"),
    ("text", "models"),  # layers of eight bits
    ("text", "checkpoints"),
    ("training", "evaluation"),
}
# A room of serving imports these other rooms, serving's errors and config, and nothing of the
# facade that stands on it; `http` stands on the facade.
ROOMS: dict[str, set[str]] = {"store": set(), "watch": {"store"}, "work": {"store", "watch"}}
FACADE = frozenset({"service", "sessions", "server", "command"})
# Units that may not use all of the layers below them.
ONLY = {"synthetic": LAYERS[0] | {"camera", "video"}}

HEAVY = frozenset(
    {
        "PIL",
        "accelerate",
        "av",
        "cv2",
        "diffusers",
        "flash_attn",
        "huggingface_hub",
        "matplotlib",
        "nvtx",
        "opentelemetry",
        "scenedetect",
        "transformers",
        "triton",
        "xformers",
    }
)
HEAVY_ALLOWED = frozenset({"training", "evaluation"})
# what the extras `serve` and `distributed` bring
WEB = frozenset(
    {"fastapi", "prometheus_client", "pydantic", "python_multipart", "ray", "starlette", "uvicorn"}
)
ENVIRONMENT = frozenset({"environ", "environb", "getenv", "putenv", "unsetenv"})
BROAD = frozenset({"Exception", "BaseException"})


def unit_of(module: tuple[str, ...]) -> str:
    """The unit of a dotted module inside the package: its first folder or file."""
    return module[1] if len(module) > 1 else "__init__"


def imported_modules(
    node: ast.Import | ast.ImportFrom, module: tuple[str, ...], *, is_package: bool
) -> Iterator[tuple[str, ...]]:
    """Dotted names that an import statement reaches, relative ones resolved.

    `from a import b` gives a.b, since b may be a module.
    """
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield tuple(alias.name.split("."))
        return
    base: tuple[str, ...] = ()
    if node.level:
        above = node.level - 1 if is_package else node.level
        base = module[: len(module) - above]
    base += tuple(node.module.split(".")) if node.module else ()
    for alias in node.names:
        yield (*base, alias.name)


def runs_at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that importing the module runs: not function bodies, not TYPE_CHECKING blocks."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.stmt):
            yield node
        pending.extend(ast.iter_child_nodes(node))


def direction_error(importer: str, imported: str) -> str | None:
    """Why one unit may not import another, or None."""
    if importer == imported:
        return None
    for unit in (importer, imported):
        if unit not in LAYER_OF:
            return f"{unit} has no layer: give it one here and in CONTRIBUTING.md"
    allowed = ONLY.get(importer)
    if allowed is not None and imported not in allowed:
        return f"{importer} must not import {imported}"
    depth = LAYER_OF[importer]
    if LAYER_OF[imported] < depth or (importer, imported) in SIDEWAYS:
        return None
    if LAYER_OF[imported] == depth == 0:
        return None
    return f"{importer} must not import {imported}"


def room_error(module: tuple[str, ...], imported: tuple[str, ...]) -> str | None:
    """Why one room of serving may not import another, or None."""
    inside = (PACKAGE, "serving")
    if len(module) < 3 or len(imported) < 3 or module[:2] != inside or imported[:2] != inside:
        return None
    room, other = module[2], imported[2]
    if room not in ROOMS or room == other or other in ROOMS[room]:
        return None
    if other in {"http", *ROOMS, *FACADE}:
        return f"serving/{room} must not import serving/{other}"
    return None


def broad_handler(node: ast.ExceptHandler) -> bool:
    """Whether a handler swallows everything; one that ends by raising again does not."""
    if node.body and isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
        return False
    caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return any(kind is None or getattr(kind, "id", None) in BROAD for kind in caught)


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return (
            node.attr in ENVIRONMENT and isinstance(node.value, ast.Name) and node.value.id == "os"
        )
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in ENVIRONMENT for alias in node.names)
    return False


def violations(source: str, path: str) -> list[str]:
    """What is wrong with one file; `path` is relative to the repository, with slashes."""
    parts = Path(path).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = parts[:-1] if is_package else parts
    tree = ast.parse(source, path)
    in_engine = parts[0] == PACKAGE
    unit = unit_of(module) if in_engine else parts[0]
    found: list[tuple[int, str]] = []

    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and broad_handler(node):
            found.append((node.lineno, "catches everything: name the exceptions"))
        if reads_environment(node) and path != f"{PACKAGE}/envs.py":
            found.append((getattr(node, "lineno", 0), "reads the environment outside envs.py"))
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for name in imported_modules(node, module, is_package=is_package):
            error = None
            if name[0] == PACKAGE and not in_engine:
                error = "kernels must not import mv2v_engine"
            elif name[0] == PACKAGE:
                # `from mv2v_engine import Engine` names the package itself
                target = unit_of(name)
                is_unit = target in LAYER_OF or isinstance(node, ast.Import) or len(name) > 2
                error = direction_error(unit, target if is_unit else "__init__")
                error = error or room_error(module, name)
            elif name[0] == "mv2v_kernels" and in_engine and unit != "ops":
                error = "only ops may import mv2v_kernels"
            elif name[0] in WEB and in_engine and unit != "serving":
                error = f"only serving may import {name[0]}"
            if error:
                found.append((node.lineno, error))

    lazy = HEAVY | {"mv2v_kernels"} if in_engine and unit not in HEAVY_ALLOWED else frozenset()
    for statement in runs_at_import(tree):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for name in imported_modules(statement, module, is_package=is_package):
                if name[0] in lazy:
                    found.append((statement.lineno, f"import {name[0]} inside the function"))
    return [f"{path}:{line}: {message}" for line, message in sorted(set(found))]


def sources() -> list[Path]:
    return [path for top in (PACKAGE, "kernels") for path in sorted((ROOT / top).rglob("*.py"))]


def test_every_file_keeps_the_direction_and_the_bans() -> None:
    files = sources()
    assert len(files) > 20
    found: list[str] = []
    for path in files:
        found += violations(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not found, "\n" + "\n".join(found)


def engine_imports() -> dict[str, set[str]]:
    """Which modules of engine/ each of them imports, for types alone or not."""
    found = {}
    for path in sorted((ROOT / PACKAGE / "engine").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = path.relative_to(ROOT).with_suffix("").parts
        names = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in imported_modules(node, module, is_package=False)
        }
        found[path.stem] = {name[2] for name in names if name[:2] == (PACKAGE, "engine")}
    return found


def test_the_engine_is_a_door_that_nothing_behind_it_knows() -> None:
    """Every module of engine/ stands on others, none on itself by a detour."""
    imports = engine_imports()
    assert 15 < len(imports) <= 25
    assert not [name for name, used in imports.items() if "engine" in used]
    above = dict(imports)
    while above:
        ground = {name for name, used in above.items() if not used & above.keys()}
        assert ground, f"these modules of engine/ import each other: {sorted(above)}"
        above = {name: used for name, used in above.items() if name not in ground}


def test_folders_that_must_not_become_packages() -> None:
    # `kernels` would collide with Hugging Face's package, `profiling` with a standard module
    for folder in ("kernels", "profiling", "stress", "csrc", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


FORBIDDEN = [
    ("ops/a.py", "import mv2v_engine.models.dit", "ops must not import models"),
    ("errors.py", "from mv2v_engine.ops import rope", "errors must not import ops"),
    ("vae.py", "from mv2v_engine.video.io import x", "vae must not import video"),
    ("tokens/plan.py", "from mv2v_engine import models", "tokens must not import models"),
    ("models/dit.py", "from mv2v_engine.checkpoints import load", "must not import checkpoints"),
    ("video/io.py", "from mv2v_engine.tokens import plan", "video must not import tokens"),
    ("parallel/a.py", "from mv2v_engine.models import dit", "parallel must not import models"),
    ("camera/a.py", "from ..memory import cache", "camera must not import memory"),
    ("memory/__init__.py", "from ..models import dit", "memory must not import models"),
    ("models/dit.py", "def f():\n    import mv2v_engine.engine", "models must not import engine"),
    ("engine/a.py", "from mv2v_engine import Engine", "engine must not import __init__"),
    ("engine/a.py", "import mv2v_engine", "engine must not import __init__"),
    ("engine/a.py", "from mv2v_engine.synthetic import b\nimport mv2v_engine.run", "import run"),
    ("serving/a.py", "from mv2v_engine.training import loop", "must not import training"),
    ("serving/store/a.py", "from mv2v_engine.serving import work", "not import serving/work"),
    ("serving/store/a.py", "from mv2v_engine.serving import http", "must not import serving/http"),
    ("serving/watch/a.py", "from ..work.host import x", "watch must not import serving/work"),
    ("serving/work/a.py", "from mv2v_engine.serving.http.app import x", "import serving/http"),
    ("serving/work/a.py", "from mv2v_engine.serving.service import x", "import serving/service"),
    ("synthetic/a.py", "from mv2v_engine.models import dit", "synthetic must not import models"),
    ("memory/a.py", "from mv2v_engine.synthetic import b", "memory must not import synthetic"),
    ("video/a.py", "from mv2v_engine.drawer import x", "drawer has no layer"),
    ("drawer.py", "from mv2v_engine.errors import x", "drawer has no layer"),
    ("engine/a.py", "def f():\n    import mv2v_kernels.adaln", "only ops may import mv2v_kernels"),
    ("ops/a.py", "import mv2v_kernels.adaln", "import mv2v_kernels inside the function"),
    ("vae.py", "from diffusers import AutoencoderKLWan", "import diffusers inside"),
    ("video/io.py", "try:\n    import av\nexcept ImportError:\n    pass", "import av inside"),
    ("run.py", "class A:\n    import PIL.Image", "import PIL inside"),
    ("run.py", "def f():\n    import uvicorn", "only serving may import uvicorn"),
    ("run.py", "def f():\n    from ray import serve", "only serving may import ray"),
    ("run.py", "if True:\n    import matplotlib", "import matplotlib inside"),
    ("run.py", "import os\nx = os.environ['A']", "outside envs.py"),
    ("run.py", "from os import getenv", "outside envs.py"),
    ("run.py", "def f():\n    import os\n    return os.getenv('A')", "outside envs.py"),
    ("run.py", "try:\n    f()\nexcept:\n    pass", "catches everything"),
    ("run.py", "try:\n    f()\nexcept Exception as e:\n    print(e)", "catches everything"),
    ("run.py", "try:\n    f()\nexcept (OSError, BaseException):\n    pass", "catches everything"),
]


@pytest.mark.parametrize(("path", "source", "message"), FORBIDDEN)
def test_a_violation_is_found(path: str, source: str, message: str) -> None:
    found = violations(source, f"{PACKAGE}/{path}")
    assert len(found) == 1
    assert message in found[0]
    assert found[0].startswith(f"{PACKAGE}/{path}:")


ALLOWED = [
    ("config.py", "from mv2v_engine.errors import RequestError"),
    ("models/dit.py", "from mv2v_engine.tokens.plan import TokenPlan\nfrom . import rope"),
    ("memory/retrieval.py", "from mv2v_engine.camera.trajectories import CameraTrajectory"),
    ("memory/cache.py", "from mv2v_engine.memory.entry import MemoryEntry\nimport torch"),
    ("checkpoints/load.py", "from mv2v_engine.models.dit import MV2VTransformer"),
    ("ops/a.py", "def f():\n    from mv2v_kernels.adaln import launch_adaln"),
    ("synthetic/a.py", "from mv2v_engine.video.io import write_video"),
    ("engine/a.py", "from mv2v_engine.sampling import flow_match\nfrom mv2v_engine import vae"),
    ("__init__.py", "from mv2v_engine.engine.engine import Engine\n__version__ = '0'"),
    ("serving/a.py", "from mv2v_engine import Engine, __version__\nimport fastapi"),
    ("serving/work/a.py", "from mv2v_engine.serving.store.jobs import x\nfrom .backend import y"),
    ("serving/http/a.py", "from mv2v_engine.serving.service import Service"),
    ("serving/store/a.py", "from mv2v_engine.serving.errors import ApiError"),
    ("run.py", "import mv2v_engine.training.loop\nfrom mv2v_engine import Engine"),
    ("training/a.py", "from diffusers import AutoencoderKLWan\nimport matplotlib"),
    ("vae.py", "def f():\n    from diffusers import AutoencoderKLWan"),
    ("vae.py", "if TYPE_CHECKING:\n    from diffusers import AutoencoderKLWan"),
    ("envs.py", "import os\nx = os.environ.get('A')"),
    ("run.py", "import os\nos.umask(0)"),
    ("run.py", "try:\n    f()\nexcept (OSError, ValueError):\n    pass"),
    ("files.py", "try:\n    f()\nexcept BaseException:\n    g()\n    raise"),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(source, f"{PACKAGE}/{path}") == []


def test_kernels_know_nothing_of_the_engine() -> None:
    path = "kernels/mv2v_kernels/adaln.py"
    found = violations("import triton\ndef f():\n    from mv2v_engine.ops import adaln", path)
    assert found == [f"{path}:3: kernels must not import mv2v_engine"]
    assert violations("import triton\nfrom mv2v_kernels.common import x", path) == []
