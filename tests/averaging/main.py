"""The rival: members without edges that average their parameters.

The members are the MACHs of asynchronous_kgraph without neighbours: the same
networks, shards, optimiser and steps. They start alike and keep the state of
their optimisers. After every `every` steps all get the mean of their parameters
(FedAvg, McMahan et al. 2017, arXiv 1602.05629). With `outer_rate` above 0, an
outer SGD with Nesterov momentum follows the mean (DiLoCo, Douillard et al. 2023,
arXiv 2311.08105). Everybody waits for everybody, so one thread is enough.

    python tests/averaging/main.py --k 10 --every 10

The log has the accuracy of the averaged network.
"""

import copy
import dataclasses
import math
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import conftest
from mach import data, metrics

EXPERIMENT = HERE.name
kgraph = conftest.load_main('asynchronous_kgraph')
Snapshot, hparam = kgraph.Snapshot, kgraph.hparam
Graph = kgraph.Hyperparameters


@dataclasses.dataclass
class Hyperparameters:
    """Edit the defaults in place, or override one for a run: --name value.

    Names that asynchronous_kgraph has too have its defaults and reasons.
    """
    data: str = hparam('data', 'folder of the MNIST files')
    validation: int = hparam(5000, 'held-out images, for eval lines', 10, 50000)
    shards: str = hparam('disjoint', 'images of a member', 'disjoint', 'skewed')
    skew: float = hparam(0.5, 'of a Dirichlet; less: more uneven', 0.01, 1e6)
    seed: int = hparam(0, 'draws weights, shards, batches', 0, 10**9)
    steps: int = hparam(3000, 'training steps of each member', 1, 10**9)
    batch_size: int = hparam(128, 'own images in one step', 1, 60000)
    evaluate_every: int = hparam(1000, 'steps; 0: no eval lines', 0, 10**9)
    device: str = hparam('cpu', 'of networks', 'cpu')
    precision: str = hparam('auto', 'auto: the faster', 'fp32', 'bf16', 'auto')
    dry_run: bool = hparam(False, 'check all, train nothing', 'False', 'True')
    k: int = hparam(5, 'members', 1, 1000)
    every: int = hparam(10, 'steps between two averages', 1, 10**9)
    sized: bool = hparam(False, 'weigh by images', 'False', 'True')
    outer_rate: float = hparam(0.0, 'of the outer SGD; 0: FedAvg', 0, 1e6)
    outer_momentum: float = hparam(0.9, 'of the outer SGD', 0, 0.999)
    learning_rate: float = hparam(0.003, 'peak', 0, 1e6)
    weight_decay: float = hparam(0.05, 'of the network', 0, 1e6)
    prior: float = hparam(0.4, 'factor of log class frequencies', 0, 10)
    dropout: float = hparam(0.3, 'of h', 0, 0.999)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = kgraph.read(field, getattr(self, field.name))
            setattr(self, field.name, value)
        self.precision = metrics.choose_precision(self.precision, self.device)


def make_isolated(settings):
    """The Hyperparameters of asynchronous_kgraph, without edges."""
    shared = vars(Graph()).keys() & vars(settings).keys()
    names = {name: getattr(settings, name) for name in shared}
    return Graph(**names | dict(connected=False))


def make_members(settings, dataset):
    """One isolated Trainer for each member; all networks start alike."""
    members = kgraph.make_trainers(make_isolated(settings), dataset)
    for one in members[1:]:
        one.network.load_state_dict(members[0].network.state_dict())
    return members


@torch.no_grad()
def average(members, shared, outer=None, sized=False):
    """Averages the members' parameters into `shared`, then copies it to all.

    Args:
        shared: the network of the last average.
        outer: its optimiser, which takes `shared` minus the mean as gradient.
            None: `shared` becomes the mean.
        sized: whether a member counts as much as its shard has images.
    """
    sizes = [int(one.batches.classes.sum()) if sized else 1 for one in members]
    networks = [one.network.parameters() for one in members]
    for target, *parts in zip(shared.parameters(), *networks):
        mean = sum(n / sum(sizes) * part for n, part in zip(sizes, parts))
        if outer:
            target.grad = target - mean
        else:
            target.copy_(mean)
    if outer:
        outer.step()
    for one in members:
        one.network.load_state_dict(shared.state_dict())


def train(settings, dataset, dies=None, look=lambda step, network, own: None):
    """Trains the members; returns the last averaged network and the members.

    Args:
        dies: index of the member that is gone after half of the steps, or None.
        look: called after each step with its number, the network of the last
            average and the members; a true answer ends the training.
    """
    members = make_members(settings, dataset)
    shared, outer = copy.deepcopy(members[0].network), None
    if settings.outer_rate:
        outer = torch.optim.SGD(shared.parameters(),
                                settings.outer_rate,
                                settings.outer_momentum,
                                nesterov=settings.outer_momentum > 0)
    for one in members:
        one.tally.begin()
    for step in range(1, settings.steps + 1):
        for one in members:
            one.step()
        if dies is not None and step == settings.steps // 2:
            del members[dies]
        if step % settings.every == 0 or step == settings.steps:
            average(members, shared, outer, settings.sized)
        if look(step, shared, members):
            break
    return shared, members


def evaluate(network, settings, images, labels):
    """Accuracy of a network without children, in percent."""
    snapshots = {0: Snapshot(metrics.Tally(0), network)}
    return kgraph.evaluate(snapshots, make_isolated(settings), images,
                           labels)[0]['real']


def main(words):
    """Runs the rival and prints its log; returns the exit status."""
    kgraph.Hyperparameters, kgraph.EXPERIMENT = Hyperparameters, EXPERIMENT
    kgraph.__doc__ = __doc__
    settings, stopped = kgraph.read_hyperparameters(words), []
    try:
        dataset = data.load(settings.data, settings.validation)
        shards = [
            one.batches.classes for one in make_members(settings, dataset)
        ]
    except data.DataError as error:
        metrics.warn(f'{EXPERIMENT}: {error}')
        return 2
    metrics.say_run(EXPERIMENT, dataset, settings, shards, threads=1)
    if settings.dry_run or metrics.FAILED:
        return int(bool(metrics.FAILED))
    due = settings.evaluate_every or math.inf

    def look(step, network, members):
        nonlocal due
        averaged = step % settings.every == 0 or step == settings.steps
        if averaged and step >= due:
            due += settings.evaluate_every
            real = evaluate(network, settings, dataset.validation_images,
                            dataset.validation_labels)
            metrics.say('eval',
                        step=step,
                        mach='mean',
                        real=real,
                        seconds=members[0].tally.seconds)
            for one in members:
                one.tally.begin()  # the clock stood still
        return stopped or metrics.FAILED

    with metrics.catch_signals(stopped.append):
        try:
            network, members = train(settings, dataset, look=look)
            real = evaluate(network, settings, dataset.test_images,
                            dataset.test_labels)
        except FloatingPointError as error:
            metrics.warn(f'{EXPERIMENT}: {error}')
            real, members = math.nan, make_members(settings, dataset)
        metrics.say_finals(EXPERIMENT, dataset, settings,
                           [dict(mach=0, real=real)],
                           {0: Snapshot(members[0].tally)})
    if stopped:
        return 128 + stopped[0]
    return int(math.isnan(real) or bool(metrics.FAILED))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
