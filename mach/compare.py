"""The table of saved logs: which runs are repetitions of one experiment."""

import math
import statistics

from mach import metrics

# Fields of the run line that may change the result, as hyperparameters do.
SOURCE = ('commit', 'threads', 'processes')


def _flaw(log):
    """Why a run does not count, or None."""
    if log.mean is None:
        return 'no final line of mach mean'
    if any(math.isnan(log.mean.get(key, 0)) for key in metrics.RESULTS):
        return 'a MACH failed'
    steps, asked = log.mean.get('steps', math.inf), log.hparams.get('steps', 0)
    return f'{steps} of {asked} steps' if steps < asked else None


def _cell(logs, key, decimals=2):
    """'mean +- std' of a field; std is that of a sample (n - 1)."""
    values = [log.mean[key] for log in logs if key in log.mean]
    if not values:
        return '-'
    text = f'{statistics.fmean(values):.{decimals}f}'
    if len(values) > 1:
        text += f' +- {statistics.stdev(values):.{decimals}f}'
    return text


def _settings(log):
    """What all runs in a row of the table share: hyperparameters, SOURCE."""
    hidden = (*metrics.BOOKKEEPING, 'connected')
    shared = {k: v for k, v in log.hparams.items() if k not in hidden}
    return shared | {k: log.run[k] for k in SOURCE if k in log.run}


def _differs(log, logs):
    """'depth 1, steps 400': the settings of `log` that vary among `logs`."""
    rows = [_settings(other) for other in logs]
    names = dict.fromkeys(name for row in rows for name in row if name != 'k')
    here = _settings(log)
    return ', '.join(f'{name} {here.get(name, "-")}' for name in names
                     if len({row.get(name) for row in rows}) > 1)


def compare(logs):
    """The table: a row per experiment, dataset, hyperparameters and SOURCE.

    A cell is mean +- std over the n runs that differ in `BOOKKEEPING` alone:
    accuracies in %, seconds of training. The column isolated shows the real
    accuracy of the runs with `connected False`. The last column names the
    settings in which the rows of an experiment differ. Runs that stopped early
    or have a failed MACH are left out with a warning on stderr. A second run of
    a seed counts, with a warning; so do several runs of uncommitted code.
    """
    groups, seen = {}, set()
    for log in logs:
        if log.skipped:
            metrics.warn(f'{log.name}: {log.skipped} lines are no log lines')
        if _flaw(log):
            metrics.warn(f'{log.name}: {_flaw(log)}, left out')
            continue
        row = (log.run.get('experiment'), log.run.get('dataset'),
               frozenset(_settings(log).items()))
        groups.setdefault(row, []).append(log)
        run = row, log.hparams.get('connected'), log.run.get('seed')
        if run in seen:
            metrics.warn(f'{log.name}: seed {run[-1]} counts again')
        seen.add(run)
    rows = [('experiment', 'dataset', 'k', 'n', 'real', 'synthetic', 'isolated',
             'seconds', 'differs in')]
    for (experiment, dataset, _), group in groups.items():
        connected = [run for run in group if run.hparams.get('connected', True)]
        isolated = [run for run in group if run not in connected]
        runs = connected or isolated
        alone = _cell(isolated, 'real')
        if isolated and len(isolated) != len(runs):
            alone += f' (n={len(isolated)})'
        firsts = [
            runs[0] for row, runs in groups.items() if row[0] == experiment
        ]
        row = [experiment, dataset, group[0].hparams.get('k', '-'), len(runs)]
        row += [_cell(connected, 'real'), _cell(connected, 'synthetic'), alone]
        row += [_cell(runs, 'seconds', 1), _differs(group[0], firsts)]
        commit = str(group[0].run.get('commit'))
        if commit.endswith('-dirty') and len(group) > 1:
            metrics.warn(
                f'{experiment}: {len(group)} runs of {commit} share a row, '
                'though their code may differ')
        rows.append([str(cell) for cell in row])
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)
