"""A process of its own that loads exports by their load.py, as a user's would, and says what features they give.

Run as a script, with ``-I -S``, by ``common.exchange.proof``; it imports nothing of this project. Its argument is a
JSON file {"packages": folders to import from, "absent": names that must not be found, "jobs": [{"folder", "loader",
"inputs", "outputs", "said", "threads"}]}. ``inputs`` and ``outputs`` are safetensors; to ``said``, a JSON file, goes
{"missing", "unexpected"} as the loader's calls of ``load_state_dict`` reported them, or {"error"}, and that is all.
"""

import importlib.util
import json
import sys
from pathlib import Path


def main(path: str) -> None:
    plan = json.loads(Path(path).read_text(encoding="utf-8"))
    sys.path.extend(plan["packages"])
    for name in plan["absent"]:
        sys.modules[name] = None                        # type: ignore[assignment]  # not even one that is installed in site-packages
        assert importlib.util.find_spec(name) is None, name
    for job in plan["jobs"]:
        try:
            said = _features(job)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        Path(job["said"]).write_text(json.dumps(said), encoding="utf-8")
        if "error" in said:                             # those after it are not asked for any more
            break


def _features(job):
    loader = _module(job["loader"])
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(job["threads"])
    with _watched(torch.nn.Module) as keys:
        model = loader.load(job["folder"])
    with torch.inference_mode():
        features = {name: model(images).float().contiguous() for name, images in load_file(job["inputs"]).items()}
    save_file(features, job["outputs"])
    return keys


def _module(path):
    spec = importlib.util.spec_from_file_location("load", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _watched:
    """Inside, what any ``load_state_dict`` finds missing or unexpected is noted, strict or not."""

    def __init__(self, kind):
        self.kind, self.plain = kind, kind.load_state_dict
        self.keys: dict[str, list[str]] = {"missing": [], "unexpected": []}

    def __enter__(self):
        def load_state_dict(module, *given, **named):
            found = self.plain(module, *given, **named)
            self.keys["missing"] += found.missing_keys
            self.keys["unexpected"] += found.unexpected_keys
            return found

        self.kind.load_state_dict = load_state_dict
        return self.keys

    def __exit__(self, *error):
        self.kind.load_state_dict = self.plain


if __name__ == "__main__":
    main(sys.argv[1])
