"""The config keys of sasa_det and what is said of them, from the source that defines them."""

import ast


def read_keys(source: str) -> dict[str, str]:
    """Read the keys that ``add_sasa_config`` sets, and the comments above them.

    Args:
        source: of the module that defines the function.

    Returns:
        dict[str, str]: the comment of each key, in the order of the file; that of a group of keys
        is not among them.
    """
    lines = source.splitlines()
    [function] = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "add_sasa_config"
    ]
    # What the variables of the function stand for.
    names = {"cfg": ""}
    comments = {}
    for statement in function.body:
        if not isinstance(statement, ast.Assign):
            continue
        variables = [t.id for t in statement.targets if isinstance(t, ast.Name)]
        [target] = [t for t in statement.targets if isinstance(t, ast.Attribute)]
        variable, _, rest = ast.unparse(target).partition(".")
        key = f"{names[variable]}{rest}"
        if ast.unparse(statement.value) == "CfgNode()":
            names |= dict.fromkeys(variables, f"{key}.")
        else:
            comments[key] = " ".join(_comment_above(lines, statement.lineno))
    return comments


def _comment_above(lines: list[str], number: int) -> list[str]:
    """Return the lines of the comment that ends above a line, which counts from 1."""
    start = number - 1
    while lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return [line.strip().removeprefix("# ") for line in lines[start : number - 1]]
