"""The fused operations give what the plain ones give, and are left alone where they do not.

The kernels run in Triton's interpreter, on the CPU, in a process that has it switched on before Triton is imported.
"""

import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_images

from common.data import recipes
from common.data.filters import GaussianBlur, Grayscale
from common.data.fused import Fused, fill, fusable
from common.data.geometry import HorizontalFlip, Rotate
from common.data.jitter import ColorJitter

ROOT = Path(__file__).resolve().parents[2]
RGB = ["instdisc", "moco_v2", "moco_v3", "moco_cifar10", "instdisc_cifar10", "small_color"]
ACROSS, N = 36, 3                                   # pixels: two blocks of the kernels; images


def photos(n=N):
    both = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    corners = [(210, 220), (280, 330), (140, 220), (280, 220)]
    return torch.stack([photo[:, y : y + ACROSS, x : x + ACROSS] for y, x in corners for photo in both])[:n]



def one(views, crops, seed, view, out=None):
    """By how many grey levels the fused view differs from the plain one, at each pixel."""
    index = torch.arange(len(crops))
    plain = views.finish(crops, seed, 0, index, view)
    out = torch.empty_like(plain) if out is None else out
    parameters = views.parameters(seed, 0, index, view)
    fill(crops, views.views[view].ops, parameters, views.mean, views.std, out)
    return (out - plain).abs() * 255 * torch.tensor(views.std).view(-1, 1, 1)


def all_occur(parameters):
    return all(values["applied"].any() for values in parameters.values())


def in_the_interpreter():
    """Everything that needs the kernels to run, as JSON."""
    crops, found = photos(), {}
    for name in RGB:
        views = getattr(recipes, name)(size=ACROSS)
        for v in range(len(set(views.views))):
            seed = next(seed for seed in range(99) if all_occur(views.parameters(seed, 0, torch.arange(N), v)))
            found[f"{name} {v}"] = float(one(views, crops, seed, v).max())
    v2, v3 = recipes.moco_v2(size=ACROSS), recipes.moco_v3(size=ACROSS)
    found["float"] = float(one(v2, crops + 0.25, 8, 0).max())
    sharp = next(seed for seed in range(99)
                 if not v2.parameters(seed, 0, torch.arange(1), 0)["GaussianBlur"]["applied"])
    found["nobody blurred"] = float(one(v2, crops[:1], sharp, 0).max())
    found["a worker's crops"] = float(one(v2, crops.contiguous(memory_format=torch.channels_last), 8, 0).max())
    strided = torch.empty(N, 3, ACROSS, ACROSS).to(memory_format=torch.channels_last)
    found["channels_last"] = float(one(v3, crops[..., :30, :], 9, 1, strided[..., :30, :]).max())
    for what, std in (("right", v2.std), ("wrong", (0.2, 0.2, 0.2))):
        fused, out = Fused(v2.views[0].ops, v2.mean, std), torch.empty(N, 3, ACROSS, ACROSS)
        fused(crops, v2.parameters(0, 0, torch.arange(N), 0), out, partial(v2._plain, v2.views[0].ops))
        found[f"{what} kernels are used"] = fused.wanted
        found[f"{what} kernels' batch"] = float((out - v2.finish(crops, 0, 0, torch.arange(N), 0)).abs().max())
    fused, out = Fused(v2.views[0].ops, v2.mean, v2.std), torch.empty(N, 3, ACROSS, ACROSS)
    for what, seed, n in (("sharp", sharp, 1), ("blurred", 8, N)):
        parameters = v2.parameters(seed, 0, torch.arange(n), 0)
        fused(crops[:n], parameters, out[:n], partial(v2._plain, v2.views[0].ops))
        found[f"all compared after a {what} batch"] = fused.checked
    return found


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [*(f"{name} 0" for name in RGB), "moco_v3 1"])
def test_fused_operations_are_the_plain_ones_in_every_recipe(found, name):
    assert found[name] < 0.01                                                           # grey levels, of any pixel


@pytest.mark.parametrize("name", ["float", "nobody blurred", "a worker's crops", "channels_last"])
def test_fused_operations_take_any_batch_and_any_layout(found, name):
    assert found[name] < 0.01


def test_kernels_are_used_only_if_their_first_batch_is_the_plain_one(found):
    assert found["right kernels are used"] and not found["wrong kernels are used"]
    assert found["right kernels' batch"] < 1e-3 and found["wrong kernels' batch"] == 0


def test_kernels_that_blur_are_compared_in_the_first_batch_that_needs_them(found):
    """Their first batch is where they would be compiled, and could fail."""
    assert not found["all compared after a sharp batch"] and found["all compared after a blurred batch"]


def test_where_the_kernels_cannot_run_this_is_said_once_and_the_plain_operations_do_it(caplog):
    views, crops, index = recipes.moco_v2(size=ACROSS), photos(), torch.arange(N)
    fused, out = Fused(views.views[0].ops, views.mean, views.std), torch.empty(N, 3, ACROSS, ACROSS)
    with caplog.at_level(logging.WARNING):
        for seed in (0, 1):
            fused(crops, views.parameters(seed, 0, index, 0), out, partial(views._plain, views.views[0].ops))
            assert out.equal(views.finish(crops, seed, 0, index, 0))
    assert [record.message.split(":")[1] for record in caplog.records] == [
        " the fused operations are not used, the plain ones are"]


def test_only_what_the_kernels_know_is_fused():
    jitter, blur = ColorJitter(0.4, 0.4, 0.4, 0.1), GaussianBlur()
    assert all(fusable(view.ops, 3) for name in RGB for view in getattr(recipes, name)().views)
    assert fusable([], 3) and fusable([jitter, blur, Grayscale()], 3)
    assert not fusable([blur, jitter], 3)                       # its contrast would need the mean of the blurred image
    assert not fusable([jitter], 1) and not fusable([Rotate(15), HorizontalFlip()], 3)


@pytest.mark.parametrize("name", ["moco_v1", "moco_v3", "moco_cifar10", "digits"])
def test_no_operation_asks_the_device_for_a_value(name):
    """Tensors on the device "meta" have none: what asked for one, to decide or to copy it back, would raise."""
    views, index = getattr(recipes, name)(size=24), torch.arange(8)
    images = torch.empty(8, len(views.mean), 32, 32, dtype=torch.uint8, device="meta")
    made = views.from_memory(images, 0, 0, index)
    made += [views.finish(images, 0, 0, index, view) for view in range(views.num_views)]
    assert {(x.device.type, x.dtype) for x in made} == {("meta", torch.float32)}


@pytest.mark.parametrize("dtype", ["u8", "fp32"])
def test_kernels_compile_for_a_gpu(dtype, tmp_path, monkeypatch):
    """For compute capability 9.0; no GPU is needed for that."""
    compiler = pytest.importorskip("triton.compiler", reason="needs Triton, which torch brings on Linux")
    backends = pytest.importorskip("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")         # what 3.9 does unasked, with a warning
    from common.data import fused_kernels

    constants = {"BEFORE": 5, "AFTER": 1, "BLOCKS": 64, "BLOCK": 1024, "RADIUS": 6}
    kinds = {"x": "*" + dtype, "scale": "fp32", "offset": "fp32"} | dict.fromkeys(("table", "sums", "between", "out"),
                                                                               "*fp32")
    names = ("luma_sums", "points") if dtype == "u8" else ("blur_rows", "blur_columns")
    for kernel in (getattr(fused_kernels, name) for name in names):
        arguments = [argument.name for argument in kernel.params]
        signature = {name: "constexpr" if name in constants else kinds.get(name.rpartition("_")[0] or name, "i32")
                     for name in arguments}
        constexprs = {(place,): constants[name] for place, name in enumerate(arguments) if name in constants}
        built = compiler.compile(compiler.ASTSource(kernel, signature, constexprs),
                                 target=backends.GPUTarget("cuda", 90, 32))
        assert built.asm["cubin"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RGB)
def test_fused_views_on_a_gpu_are_the_plain_ones_without_waiting(name):
    views, crops, index = getattr(recipes, name)(size=ACROSS), photos(8).cuda(), torch.arange(8)
    for view in range(views.num_views):
        seed = next(seed for seed in range(99) if all_occur(views.parameters(seed, 0, index, view)))
        views.finish(crops, seed, 0, index, view)                                       # the first batch is compared
        assert views._fused[view].wanted and views._fused[view].checked
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = views.finish(crops, 1, 0, index, view)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        error = (out.cpu() - views.finish(crops.cpu(), 1, 0, index, view)).abs() * 255
        assert error.mean() < 0.05 and error.max() < 2 / min(views.std)


if __name__ == "__main__":
    print(json.dumps(in_the_interpreter()))
