"""The script that most people would write: a DataLoader, Adam, one network.

The network is the one of a MACH without neighbours. The data are all training
images, read image by image, as the examples of torchvision do.

    python tests/plain/main.py
"""

import dataclasses
import itertools
import pathlib
import sys
import time

import torch
from torch import nn
from torchvision import datasets, transforms

HERE = pathlib.Path(__file__).resolve().parent
CORES = torch.get_num_threads()
sys.path.insert(0, str(HERE.parent))
import conftest
from mach import data, metrics

EXPERIMENT = HERE.name
single = conftest.load_main('synchronous_single')
Snapshot = conftest.load('synchronous_single').trainer.Snapshot
hparam = single.hparam
torch.set_num_threads(CORES)  # as torch does by default


@dataclasses.dataclass
class Hyperparameters:
    """Edit the defaults in place, or override one for a run: --name value."""
    data: str = hparam('data', 'folder of the MNIST files')
    validation: int = hparam(5000, 'held-out images, for eval lines', 10, 50000)
    seed: int = hparam(0, 'draws weights and batches', 0, 10**9)
    steps: int = hparam(4300, 'training steps; 860 are an epoch', 1, 10**9)
    batch_size: int = hparam(64, 'images in one step', 1, 50000)
    evaluate_every: int = hparam(100, 'steps; 0: no eval lines', 0, 10**9)
    device: str = hparam('cpu', 'of the network', 'cpu')
    precision: str = hparam('fp32', 'of matrix products', 'fp32')
    learning_rate: float = hparam(0.001, 'of Adam', 0, 1e6)
    dry_run: bool = hparam(False, 'check all, train nothing', 'False', 'True')

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = single.read(field, getattr(self, field.name))
            setattr(self, field.name, value)


def make_network():
    """x [B, 1, 28, 28] in 0..1 -> logits [B, 10]."""
    layers = [nn.Flatten()]
    for before, after in itertools.pairwise((784, 512, 256, 64, 10)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_loader(settings, dataset):
    """A DataLoader of the training images of a Dataset, in batches.

    Raises:
        data.DataError: there is no MNIST; torchvision reads no drawn digits.
    """
    try:
        mnist = datasets.MNIST(settings.data, True, transforms.ToTensor())
    except (OSError, RuntimeError) as error:
        raise data.DataError(f'{error} ({settings.data})') from None
    mnist.data = dataset.train_images.unflatten(1, (28, 28))
    mnist.targets = dataset.train_labels
    return torch.utils.data.DataLoader(mnist, settings.batch_size, shuffle=True)


@torch.no_grad()
def evaluate(network, images, labels):
    """Accuracy in percent on images uint8 [N, 784]."""
    right = network(images / 255).argmax(1) == labels
    return 100 * right.float().mean().item()


def train(settings, dataset, tally, look=lambda step, network: None):
    """Trains the network and returns it.

    Args:
        tally: counts the steps; its clock stands still during `look`.
        look: called after each step; a true answer ends the training.
    """
    torch.manual_seed(settings.seed)
    network, loader = make_network(), make_loader(settings, dataset)
    optimiser = torch.optim.Adam(network.parameters(), settings.learning_rate)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    tally.begin()
    spent, began = 0.0, time.perf_counter()
    for step, (x, y) in zip(range(1, settings.steps + 1), batches):
        optimiser.zero_grad()
        logits = network(x)
        loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        optimiser.step()
        tally.step(loss, logits, y)
        spent += time.perf_counter() - began
        tally.seconds = spent
        if look(step, network):
            break
        began = time.perf_counter()
    return network


def main(words):
    """Runs the script and prints its log; returns the exit status."""
    single.Hyperparameters, single.EXPERIMENT = Hyperparameters, EXPERIMENT
    single.__doc__ = __doc__
    settings, stopped = single.read_hyperparameters(words), []
    try:
        dataset = data.load(settings.data, settings.validation)
        make_loader(settings, dataset)
    except data.DataError as error:
        metrics.warn(f'{EXPERIMENT}: {error}')
        return 2
    classes = dataset.train_labels.bincount(minlength=data.CLASSES)
    metrics.say_run(EXPERIMENT, dataset, settings, [classes], CORES)
    if settings.dry_run or metrics.FAILED:
        return int(bool(metrics.FAILED))
    tally, every = metrics.Tally(0), settings.evaluate_every

    def look(step, network):
        if every and step % every == 0:
            real = evaluate(network, dataset.validation_images,
                            dataset.validation_labels)
            metrics.say('eval',
                        step=step,
                        mach='mean',
                        real=real,
                        seconds=tally.seconds)
        return stopped or metrics.FAILED

    with metrics.catch_signals(stopped.append):
        network = train(settings, dataset, tally, look)
        real = evaluate(network, dataset.test_images, dataset.test_labels)
        metrics.say_finals(EXPERIMENT, dataset, settings,
                           [dict(mach=0, real=real)], {0: Snapshot(tally)})
    return 128 + stopped[0] if stopped else int(bool(metrics.FAILED))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
