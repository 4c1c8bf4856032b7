"""Which logs belong together, and what a picture shows of them."""

import itertools
import math
import statistics

from mach import metrics

# Fields of the run line that may change the result, as hyperparameters do.
SOURCE = ('dataset', 'commit', 'threads', 'processes')
# Hyperparameters that `accuracy` and `rate` are drawn against -> x axis.
SWEPT = dict(k='k, MACHs', latency='latency, s')
SWEPT |= dict(loss_rate='loss_rate', skew='skew')


def flaw(log):
    """Why a run does not count, or None."""
    if log.mean is None:
        return 'no final line of mach mean'
    if any(math.isnan(log.mean.get(key, 0)) for key in metrics.RESULTS):
        return 'a MACH failed'
    steps, asked = log.mean.get('steps', math.inf), log.hparams.get('steps', 0)
    return f'{steps} of {asked} steps' if steps < asked else None


def settings(log, hidden=()):
    """What the runs of a group share: hyperparameters and SOURCE.

    BOOKKEEPING and the settings `hidden` are left out.
    """
    shared = log.hparams | {k: log.run[k] for k in SOURCE if k in log.run}
    hidden = (*metrics.BOOKKEEPING, *hidden)
    return {k: v for k, v in shared.items() if k not in hidden}


def group(logs, hidden=()):
    """Lists of the logs that share experiment and `settings`."""
    groups = {}
    for log in logs:
        row = frozenset(settings(log, hidden).items())
        groups.setdefault((log.run.get('experiment'), row), []).append(log)
    return list(groups.values())


def differs(log, groups, hidden=()):
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
    """Label -> logs of each line of a picture.

    A line may have logs of several commits: a figure is recorded bit by bit.

    Args:
        hidden: other settings in which the logs of a line may differ.
    """
    hidden = *hidden, 'commit'
    groups, found = group(logs, hidden), {}
    for same in groups:
        words = [str(same[0].run.get('experiment'))]
        words += filter(None, [differs(same[0], groups, hidden)])
        found[', '.join(words)] = same
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


def curve(rows, by, x, y, least=1):
    """[(mean x, mean y, standard deviation of y)], for each value of a field.

    Args:
        rows: dicts of fields; rows without `by` or with a nan are left out.
        by, x, y: fields.
        least: the number of rows that a value must have.
    """
    groups, points = {}, []
    for row in rows:
        if by in row and not math.isnan(row.get(y, math.nan)):
            groups.setdefault(row[by], []).append((row[x], row[y]))
    for _, pairs in sorted(groups.items()):
        if len(pairs) >= least:
            xs, ys = zip(*pairs)
            std = statistics.stdev(ys) if len(ys) > 1 else 0.0
            points.append((statistics.fmean(xs), statistics.fmean(ys), std))
    return points


def curves(logs):
    """Panel -> [(label, y, curve)], and the name of `swept`.

    Panels are steps, seconds, accuracy and rate; y is `real`, `synthetic` or
    `rate`. No curve is empty. `steps` and `seconds` have the steps that all
    runs of a line have.
    """
    found, name = [], swept(logs)
    for label, same in lines(logs).items():
        runs = [log for log in same if log.evals]
        # A resumed run may repeat a step: its last line counts.
        evals = [{line['step']: line for line in log.evals} for log in runs]
        rows = [line for steps in evals for line in steps.values()]
        for y in 'real', 'synthetic':
            for panel, x in ('steps', 'step'), ('seconds', 'seconds'):
                points = curve(rows, 'step', x, y, least=len(runs))
                found.append((panel, label, y, points))
    for label, same in lines(logs, [name]).items() if name else ():
        rows = [log.hparams | log.mean for log in same]
        for panel, y in ('accuracy', 'real'), ('rate', 'rate'):
            found.append((panel, label, y, curve(rows, name, name, y)))
    panels = {}
    for panel, *line in found:
        if line[-1]:
            panels.setdefault(panel, []).append(line)
    return panels, name


def tables(logs):
    """Panel -> matrix: worth [mach, child], classes [mach, class]; and a note.

    Both are of the logs with edges, if there are any. Worth is the mean over
    the runs. If their shards differ, both panels are of the first run alone.
    There is no panel if the logs have several settings.
    """
    logs, found = [log for log in logs if log.edges] or logs, {}
    if len(group(logs)) != 1:
        return found, ''
    note, worth, shards = f'mean, n = {len(logs)}', {}, logs[0].shards
    if any(log.shards != shards for log in logs):
        logs = logs[:1]
        note = f'seed {logs[0].run.get("seed")} alone: shards differ'
    for edge in itertools.chain(*(log.edges for log in logs)):
        cell = edge['mach'], edge['child']
        worth.setdefault(cell, []).append(edge['worth'])
    if worth and shards:
        places = range(len(shards))
        found['worth'] = [[
            statistics.fmean(worth.get((i, j), [math.nan])) for j in places
        ] for i in places]
    if shards:
        rows = [str(shard['classes']).split(',') for shard in shards]
        found['classes'] = [list(map(int, row)) for row in rows]
    return found, note
