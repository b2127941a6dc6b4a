"""Imports point down: a file may import from floors below its own, and from its own folder.

The floors are the order in which the data flows; the table here is the only place that says it.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "hf_cl"
FLOORS = (
    ("errors",),
    ("config", "ranks"),
    ("plugins",),
    ("masks", "ownership", "metrics"),
    ("merging",),
    ("data", "layers", "checkpoints"),
    ("storage", "proof", "plots", "capacity"),
    ("starts", "routing", "disk_merge"),
    ("tuner",),
    ("training",),
    ("methods",),
    ("packing",),
    ("runs", "results", "recipe", "report"),
    ("learner", "task_pipeline", "routed_pipeline"),
    ("from_recipe", "bank"),
    ("tuning", "evaluate_run", "evaluate_bank", "sweep_plan"),
    ("train_stream",),
    ("sweep",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def part(module: str) -> str:
    """Return the folder or file of `hf_cl` that a dotted module name lies in."""
    return module.split(".")[1] if "." in module else ""


def homes() -> dict[str, str]:
    """Return the module that each lazy name of the package brings, read without importing it."""
    for node in ast.parse((ROOT / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOME":
            return {f"hf_cl.{name}": home for name, home in ast.literal_eval(node.value).items()}
    return {}


def imports(file: Path) -> list[tuple[int, str]]:
    """Return (line, module) of every import of this package in a file; type-checking blocks count too."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hf_cl":
            names = [f"hf_cl.{alias.name}" for alias in node.names] if node.module == "hf_cl" else [node.module]
            found += [(node.lineno, homes().get(name, name)) for name in names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "hf_cl"]
    return found


def main() -> int:
    """Print every import that points up or sideways; return 1 if there is one."""
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        if own not in FLOOR:
            wrong.append(f"{file.relative_to(ROOT.parent)}: {own!r} stands on no floor; add it here")
            continue
        for line, module in imports(file):
            target = part(module)
            if target in FLOOR and target != own and FLOOR[target] >= FLOOR[own]:
                wrong.append(f"{file.relative_to(ROOT.parent)}:{line}: imports {module}, which is not below it")
    print("\n".join(wrong) or "imports point down")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
