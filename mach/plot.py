"""Draws the logs of runs: python mach/main.py --compare LOG... --plot PICTURE

A line is the mean over the runs of one setting, in a band of +- their standard
deviation (n - 1), as in the table. A figure may be recorded bit by bit, so the
runs of a line may have several commits. matplotlib is optional.
"""

import importlib.util
import itertools
import math
import os
import pathlib

import numpy

from mach import metrics

# Hyperparameters that `accuracy` and `rate` are drawn against; units.
SWEPT = dict(k='MACHs', latency='s', loss_rate='share', skew='Dirichlet')
EVALS = 'validation accuracy, %', 'eval lines'
SWEEP = f'logs that differ in one of {", ".join(SWEPT)}'
# Panel -> its x field, its y fields, its y axis, and what it needs.
PANELS = dict(steps=('step', 'real synthetic', *EVALS))
PANELS |= dict(seconds=('seconds', 'real synthetic', *EVALS))
PANELS |= dict(accuracy=('', 'real', 'real, % of test images', SWEEP))
PANELS |= dict(rate=('', 'rate', 'rate of the slowest MACH, steps/s', SWEEP))
PANELS |= dict(worth=('', 'child', 'mach', 'one log with edge lines'))
PANELS |= dict(classes=('', 'class', 'mach', 'one log with edge lines'))
SUFFIXES = '.png', '.svg', '.pdf'
# Okabe and Ito's colours, but yellow: the colour-blind can tell them apart.
COLOURS = '#0072B2 #D55E00 #009E73 #CC79A7 #000000 #56B4E9 #E69F00'.split()
MARKERS, DASHES = 'osD^vPX*', dict(real='-', synthetic='--', rate='-')
# The legend is below the figure: `tight` makes the picture large enough.
STYLE = {'font.size': 9, 'savefig.dpi': 200, 'savefig.bbox': 'tight'}
STYLE |= {'svg.fonttype': 'none', 'svg.hashsalt': 'mach', 'pdf.fonttype': 42}


def obstacle(picture):
    """Why no picture can be written to this path, or None."""
    path = pathlib.Path(picture)
    if path.suffix not in SUFFIXES:
        return f'{path} must end with {" or ".join(SUFFIXES)}'
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        return f'cannot write {path}'
    missing = not importlib.util.find_spec('matplotlib')
    return 'it needs matplotlib: pip install matplotlib' if missing else None


def draw_curves(axes, panel, logs, swept, looks):
    """Draws the lines of a panel; looks: label -> its number in the figure."""
    x, fields, *_ = PANELS[panel]
    by, found = 'step', metrics.lines(logs)
    axes.set(xlabel=f'{panel} (solid: real, dashed: synthetic)')
    if not x:
        by, x, found = swept, swept, metrics.lines(logs, swept)
        values = sorted({one.hparams[x] for one in logs if x in one.hparams})
        least = min(value for value in values if value > 0)
        if values[-1] >= 30 * least:  # it spans decades
            axes.set_xscale('symlog', linthresh=least)
        axes.set_xticks(values, map('{:g}'.format, values))
        axes.set(xlabel=f'{x} ({SWEPT[x]})')
    for label, same in found.items():
        for y in fields.split():
            points = metrics.curve(same, by, x, y)
            if points:
                i = looks.setdefault(label, len(looks))
                look = dict(color=COLOURS[i % len(COLOURS)], linewidth=1)
                xs, means, stds = numpy.transpose(points)
                low, high = means - stds, means + stds
                axes.fill_between(xs, low, high, alpha=0.2, **look)
                form = MARKERS[i % len(MARKERS)] + DASHES[y]
                axes.plot(xs, means, form, label=label, markersize=4, **look)
    if by == 'step' and axes.lines:  # down to 5 points below the least end
        ends = [line.get_ydata()[-1] for line in axes.lines]
        axes.set_ylim(bottom=max(axes.get_ylim()[0], min(ends) - 5))


def draw_matrix(axes, panel, log):
    """Draws worth [mach, child] or classes [mach, class] of one log."""
    rows = [str(shard['classes']).split(',') for shard in log.shards]
    rows = numpy.array([*itertools.zip_longest(*rows, fillvalue='nan')],
                       float).T
    if panel == 'worth':
        rows = numpy.full((len(rows), len(rows)), math.nan)
        for edge in log.edges:
            rows[edge['mach'], edge['child']] = edge['worth']
    most = numpy.nanmax(abs(rows)) or 1
    look = dict(vmin=-most, vmax=most, alpha=0.6, aspect='auto')
    image = axes.imshow(rows, 'PuOr', **look)
    unit, form = dict(worth=('points', '.2f'), classes=('images', '.0f'))[panel]
    axes.set(title=f'{panel}, {unit}, seed {log.run.get("seed")}')
    axes.set(xlabel=PANELS[panel][1])
    if len(rows) > 12:
        axes.figure.colorbar(image, ax=axes)
        return
    axes.set(xticks=range(rows.shape[1]), yticks=range(len(rows)))
    for (i, j), x in numpy.ndenumerate(rows):
        text = '' if math.isnan(x) else format(x, form)
        axes.text(j, i, text, ha='center', va='center', fontsize=6)


def make_figure(logs, panels=None):
    """The matplotlib Figure for print, 7 inches wide without its legend.

    Args:
        logs: of runs that count.
        panels: of PANELS; None: all that apply.

    Raises:
        ValueError: a panel does not apply.
    """
    from matplotlib import figure  # pylint: disable=import-outside-toplevel
    varying = [
        name for name in SWEPT for same in metrics.lines(logs, name).values()
        if len({log.hparams.get(name) for log in same} - {None}) > 1
    ]
    applies = dict.fromkeys(('steps', 'seconds'), any(x.evals for x in logs))
    applies |= dict.fromkeys(('accuracy', 'rate'), varying)
    matrix = len(logs) == 1 and logs[0].edges and logs[0].shards
    applies |= dict.fromkeys(('worth', 'classes'), matrix)
    shown = list(dict.fromkeys(panels or filter(applies.get, PANELS)))
    for panel in shown:
        if not applies[panel]:
            raise ValueError(f'panel {panel} needs {PANELS[panel][-1]}')
    if not shown:
        raise ValueError('no panel applies to the logs that count')
    # Two panels share a row; a last one has the whole row.
    rows = [(shown[i:i + 2] * 2)[:2] for i in range(0, len(shown), 2)]
    whole = figure.Figure((7, 2.8 * len(rows)), layout='constrained')
    handles, looks = {}, {}
    for panel, axes in whole.subplot_mosaic(rows).items():
        axes.set(ylabel=PANELS[panel][2])
        if panel in ('worth', 'classes'):
            draw_matrix(axes, panel, logs[0])
        else:
            draw_curves(axes, panel, logs, (varying or [None])[0], looks)
        handles |= {line.get_label(): line for line in reversed(axes.lines)}
    if handles:
        whole.legend(handles.values(), handles, bbox_to_anchor=(0, 0), loc=2)
    return whole


def draw(picture, logs, panels=None):
    """Writes a picture; the same logs give the same SVG.

    The path has no `obstacle`; the rest is as in `make_figure`.
    """
    import matplotlib  # pylint: disable=import-outside-toplevel
    svg = pathlib.Path(picture).suffix == '.svg'
    with matplotlib.rc_context(STYLE):
        whole = make_figure(logs, panels)
        whole.savefig(picture, metadata={'Date': None} if svg else None)
