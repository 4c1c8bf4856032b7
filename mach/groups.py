"""Which logs belong together, and what a picture shows of them."""

import itertools
import math
import statistics

from mach import metrics

# Fields of the run line that may change the result, as hyperparameters do.
SOURCE = ('commit', 'threads', 'processes')
# Hyperparameters that `accuracy` and `rate` are drawn against.
SWEPT = ('k', 'latency', 'loss_rate', 'skew')
# Panel -> what it needs.
NEEDS = dict.fromkeys(('steps', 'seconds'), 'eval lines at common steps')
NEEDS |= dict.fromkeys(
    ('accuracy', 'rate'),
    f'logs that differ in one of {", ".join(SWEPT)}, and in no other setting')
NEEDS |= dict(worth='edge lines, all of one setting')
NEEDS |= dict(classes='shard lines, all of one setting')


def flaw(log):
    """Why a run does not count, or None."""
    if log.mean is None:
        return 'no final line of mach mean'
    if any(math.isnan(log.mean.get(key, 0)) for key in metrics.RESULTS):
        return 'a MACH failed'
    steps, asked = log.mean.get('steps', math.inf), log.hparams.get('steps', 0)
    return f'{steps} of {asked} steps' if steps < asked else None


def settings(log, hidden=()):
    """What runs in a row of the table share, but for the settings `hidden`.

    These are hyperparameters and SOURCE.
    """
    hidden = (*metrics.BOOKKEEPING, 'connected', *hidden)
    shared = log.hparams | {k: log.run[k] for k in SOURCE if k in log.run}
    return {k: v for k, v in shared.items() if k not in hidden}


def group(logs, hidden=()):
    """Lists of the logs that share experiment, dataset and settings."""
    groups = {}
    for log in logs:
        row = (log.run.get('experiment'), log.run.get('dataset'),
               frozenset(settings(log, hidden).items()))
        groups.setdefault(row, []).append(log)
    return list(groups.values())


def differs(log, groups, hidden=('k',)):
    """'depth 1, steps 400': in what the groups of its experiment differ."""
    rows = [
        settings(first, hidden)
        for first, *_ in groups
        if first.run.get('experiment') == log.run.get('experiment')
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    here = settings(log)
    return ', '.join(f'{name} {here.get(name, "-")}' for name in names
                     if len({row.get(name) for row in rows}) > 1)


def lines(logs, hidden=()):
    """Label -> logs of each line of a picture: a row, connected or isolated.

    Args:
        hidden: settings in which the logs of a line may differ.
    """
    groups, found = group(logs, hidden), {}
    datasets = {log.run.get('dataset') for log in logs}
    for log in itertools.chain(*groups):
        words = [str(log.run.get('experiment'))]
        words += [str(log.run.get('dataset'))] * (len(datasets) > 1)
        words += [differs(log, groups, hidden)]
        words += ['isolated'] * (not log.hparams.get('connected', True))
        found.setdefault(', '.join(filter(None, words)), []).append(log)
    return found


def swept(logs):
    """The one of SWEPT that differs where all else is equal; None if not one."""
    names = [
        name for name in SWEPT if any(
            len({log.hparams.get(name)
                 for log in same} - {None}) > 1
            for same in lines(logs, [name]).values())
    ]
    return names[0] if len(names) == 1 else None


def evaluations(log):
    """The `eval` lines of `mach mean`; without one, the mean of the MACHs.

    A resumed run may repeat a step: the last line of a step and MACH counts.
    """
    found = {}
    for line in log.evals:
        found.setdefault(line.get('step'), {})[line.get('mach')] = line
    return [
        dict(machs.get('mean') or metrics.mean(list(machs.values())), step=step)
        for step, machs in found.items()
    ]


def curve(runs, by, x, y):
    """[(mean x, mean y, standard deviation of y)], for each value of a field.

    Args:
        runs: the rows of each run; a row is a dict of fields.
        by: the field. Of `step`, values count that all runs have.
        x, y: fields; rows without one of by, x and y, or with nan, are left out.
    """
    groups, least = {}, len(runs) if by == 'step' else 1
    for row in itertools.chain(*runs):
        if {by, x, y} <= set(row) and not math.isnan(row[y]):
            groups.setdefault(row[by], []).append((row[x], row[y]))
    points = []
    for _, pairs in sorted(groups.items()):
        xs, ys = zip(*pairs)
        std = statistics.stdev(ys) if len(ys) > 1 else 0.0
        points += [(statistics.fmean(xs), statistics.fmean(ys), std)
                  ] * (len(ys) >= least)
    return points


def curves(logs):
    """Panel -> [(label, y, curve)], and the name of `swept`.

    Panels are steps, seconds, accuracy and rate; y is `real`, `synthetic` or
    `rate`. No curve is empty.
    """
    found, name = {panel: [] for panel in NEEDS}, swept(logs)

    def add(panel, label, y, points):
        if points:
            found[panel].append((label, y, points))

    for label, same in lines(logs).items():
        runs = [evaluations(log) for log in same if log.evals]
        for y in 'real', 'synthetic':
            add('steps', label, y, curve(runs, 'step', 'step', y))
            add('seconds', label, y, curve(runs, 'step', 'seconds', y))
    for label, same in lines(logs, [name]).items() if name else ():
        rows = [[log.hparams | log.mean for log in same]]
        add('accuracy', label, 'real', curve(rows, name, name, 'real'))
        add('rate', label, 'rate', curve(rows, name, name, 'rate'))
    return found, name


def tables(logs):
    """Panel -> matrix: worth [mach, child], classes [mach, class]; and a note.

    Worth is the mean over the runs. If their shards differ, both panels are of
    the first run alone. Without edges, the shards count. There is no panel if
    the logs have several settings.
    """
    logs = [log for log in logs if log.edges
           ] or [log for log in logs if log.shards]
    if len(lines(logs)) != 1:
        return {}, ''
    note, worth = f'mean, n = {len(logs)}', {}
    if any(log.shards != logs[0].shards for log in logs):
        logs = logs[:1]
        note = f'seed {logs[0].run.get("seed")} alone: shards differ'
    for edge in itertools.chain(*(log.edges for log in logs)):
        cell = edge['mach'], edge['child']
        worth.setdefault(cell, []).append(edge['worth'])
    places = range(1 + max(itertools.chain(*worth), default=-1))
    matrix = [[statistics.fmean(worth.get((i, j), [math.nan]))
               for j in places]
              for i in places]
    classes = [str(shard['classes']).split(',') for shard in logs[0].shards]
    classes = [list(map(int, row)) for row in classes]
    return dict(worth=matrix, classes=classes), note
