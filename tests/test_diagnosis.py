"""What a stop over numbers says: the first value that is not finite, and the images that it came from."""

import math

import pytest
import torch

from common.diagnosis import Finding, NonFinite, first_of
from common.tree import digest
from tests.test_train import moco, trainer


def stop(run, message):
    """The error at the first step that is not finite."""
    with pytest.raises(NonFinite, match=message) as stopped:
        list(run.steps())
    return stopped.value


@pytest.fixture
def run():
    return trainer(moco(), max_skipped=1, accumulate=2, batch_size=16)


def spoil_view(run, micro, view, row):
    """The loader's second step, in place."""
    stream = run.loader.stream

    def spoiled(*arguments):
        for step, batches, waited in stream(*arguments):
            if step == 1:
                batches[micro].views[view][row, 0, 2, 2] = math.inf
            yield step, batches, waited

    run.loader.stream = spoiled


@pytest.mark.parametrize("micro, view, row", [(0, 0, 3), (1, 1, 7)])
def test_an_image_that_is_not_finite_is_named(run, micro, view, row):
    spoil_view(run, micro, view, row)
    image = run.loader.images_of(1)[8 * micro + row]
    path = run.loader.images.path(image)
    error = stop(run, f"step 2: .* view {view} of these images is not finite. Images: {path}. Look at these images")
    assert error.step == 2 and error.finding.images == [image]


def layers(run):
    return [name for name, module in run.method.encoder.named_modules() if not list(module.children())]


@pytest.mark.parametrize("number", [0, 3, -1])
def test_the_first_layer_whose_output_is_not_finite_is_named_and_its_images(run, number):
    name = layers(run)[number]

    def spoil(module, inputs, output):
        output = output.clone()
        output[[2, 5]] = math.nan
        return output

    run.method.encoder.get_submodule(name).register_forward_hook(spoil)
    error = stop(run, f"the output of encoder.{name} is not finite. Images: ")
    assert error.finding.images == [run.loader.images_of(0)[i] for i in (2, 5)]


@pytest.mark.parametrize("number", [0, 4, -1])
def test_the_weight_whose_gradient_breaks_first_on_the_way_back_is_named(run, number):
    name, weight = [*run.method.encoder.named_parameters()][number]
    weight.register_hook(lambda gradient: gradient * math.inf)
    error = stop(run, f"the gradient of encoder.{name} is not finite. Images: .* and 13 more. Try a lower learning")
    assert sorted(error.finding.images) == sorted(run.loader.images_of(0))


def test_a_memory_that_is_not_finite_is_named(run):
    run.method.dictionary.keys[3, 1] = math.nan
    assert stop(run, "dictionary.keys, which no skipped step has changed, is not finite")


def test_the_search_changes_nothing(run):
    spoil_view(run, 0, 0, 0)
    steps = run.steps()
    next(steps)
    before = digest([run.method.state_dict(), run.optimizer.state_dict()["state"]])
    with pytest.raises(NonFinite):
        next(steps)
    assert digest([run.method.state_dict(), run.optimizer.state_dict()["state"]]) == before
    assert all(p.grad is None for p in run.method.parameters()) and run.step == 1


def test_what_does_not_come_back_when_the_step_is_repeated_is_said_to():
    once = trainer(moco(), max_skipped=1)
    forward, calls = once.method.forward, []

    def spoiled(batch):
        calls.append(batch)
        output = forward(batch)
        return output._replace(loss=output.loss + math.inf) if len(calls) == 1 else output

    once.method.forward = spoiled
    stop(once, "when the step was repeated, everything was finite")


def test_the_earliest_finding_of_all_ranks_counts():
    image, layer, other = (Finding(order, what, [rank], [rank], "Try.") for order, what, rank in
                           [(0, "a view", 1), (2, "a layer", 0), (0, "a view", 2)])
    assert first_of([layer, image, other]) == Finding(0, "a view", [1, 2], [1, 2], "Try.")
    error = NonFinite(9, 3, 1, image, lambda i: f"{i}.png")
    assert "a view. Images: 1.png. Try." in str(error) and "and 1 rollback did not help" in str(error)


def test_a_compiled_encoder_is_searched_layer_by_layer(run):
    run.method.encoder.compile(backend="eager")
    torch._dynamo.reset()
    run.method.encoder.backbone.register_forward_hook(lambda module, inputs, output: output * math.nan)
    stop(run, "the output of encoder.backbone is not finite")
