"""Run a notebook without Jupyter, and keep what its cells print and draw.

python scripts/docs/run_notebook.py examples/ring_attention.ipynb
"""

import argparse
import base64
import contextlib
import io
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ring_attention.checks import local_path


def execute(notebook: dict) -> dict:
    """The notebook with the outputs of its code cells, run in order in one namespace; an error goes through."""
    namespace, count, cells = {"__name__": "__main__"}, 0, []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell = cell | {"execution_count": count, "outputs": _run("".join(cell["source"]), namespace, count)}
        cells.append(cell)
    return notebook | {"cells": cells}


def _run(source: str, namespace: dict, count: int) -> list[dict]:
    """What a cell printed, and the figures that it left open, as outputs of a notebook."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, f"cell {count}", "exec"), namespace)
    outputs = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=80, bbox_inches="tight", metadata={"Software": None})
        data = base64.b64encode(picture.getvalue()).decode()
        outputs.append({"output_type": "display_data", "metadata": {}, "data": {"image/png": data}})
    plt.close("all")
    return outputs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=local_path, help="the .ipynb to run; its outputs are replaced")
    path = parser.parse_args().notebook
    done = execute(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"ran {path}")
