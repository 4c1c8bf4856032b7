"""Draws the logs of runs: python mach/main.py --compare LOG... --plot PICTURE

A line is the mean over the runs of one setting, in a band of +- their standard
deviation (n - 1), as in the table. Of `steps` and `seconds`, the y axis leaves
out what is far below the second half of the lines. `accuracy` and `rate` leave
out logs without the hyperparameter of their x axis. matplotlib is optional.
"""

import importlib.util
import os
import pathlib

from mach import groups

EVALS = 'validation accuracy, %', 'eval lines at common steps'
SWEEP = (f'logs that differ in one of {", ".join(groups.SWEPT)}, and in no '
         'other setting')
# Panel -> its x axis, its y axis, and what it needs. '' is what is swept.
PANELS = dict(
    steps=('steps (solid: real, dashed: synthetic)', *EVALS),
    seconds=('seconds (solid: real, dashed: synthetic)', *EVALS),
    accuracy=('', 'real, % of test images', SWEEP),
    rate=('', 'rate, steps/s of one MACH', SWEEP),
    worth=('child (worth: points)', 'mach', 'edge lines, all of one setting'),
    classes=('class (images)', 'mach', 'shard lines, all of one setting'),
)
SUFFIXES = '.png', '.svg', '.pdf'
# Okabe and Ito's colours, but yellow: the colour-blind can tell them apart.
COLOURS = '#0072B2 #D55E00 #009E73 #CC79A7 #000000 #56B4E9 #E69F00'.split()
MARKERS, DASHES = 'osD^vPX*', dict(real='-', synthetic='--', rate='-')
# The legend is below the figure: `tight` makes the picture large enough.
STYLE = {'font.size': 9, 'axes.titlesize': 9, 'savefig.dpi': 200}
STYLE |= {'savefig.bbox': 'tight', 'pdf.fonttype': 42}
STYLE |= {'svg.fonttype': 'none', 'svg.hashsalt': 'mach'}


def obstacle(picture):
    """Why no picture can be written to this path, or None."""
    path = pathlib.Path(picture)
    if path.suffix not in SUFFIXES:
        return f'{path} must end with {" or ".join(SUFFIXES)}'
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        return f'cannot write {path}'
    missing = not importlib.util.find_spec('matplotlib')
    return 'it needs matplotlib: pip install matplotlib' if missing else None


def draw_curves(axes, curves, labels):
    """Draws lines in bands; the place in `labels` chooses the colour."""
    for label, y, points in curves:
        i, (x, mean, std) = labels.index(label), zip(*points)
        low, high = zip(*((m - s, m + s) for m, s in zip(mean, std)))
        look = dict(color=COLOURS[i % len(COLOURS)], linewidth=1)
        axes.fill_between(x, low, high, alpha=0.2, **look)
        look |= dict(label=label, linestyle=DASHES[y], markersize=4)
        axes.plot(x, mean, marker=MARKERS[i % len(MARKERS)], **look)


def zoom(axes, curves):
    """Leaves out what is far below the second half of the lines."""
    ends = [mean for *_, p in curves for _, mean, _ in p[len(p) // 2:]]
    bottom = min(ends) - (max(ends) - min(ends)) - 1
    axes.set_ylim(max(bottom, axes.get_ylim()[0]))


def set_ticks(axes, curves):
    """Puts ticks at each x; on a log axis if positive ones span decades."""
    values = sorted({x for *_, points in curves for x, *_ in points})
    positive = [x for x in values if x > 0]
    if positive and max(positive) >= 30 * min(positive):
        axes.set_xscale('symlog', linthresh=min(positive))
    axes.set_xticks(values, [f'{x:g}' for x in values])
    axes.minorticks_off()


def draw_table(axes, rows, form):
    """Draws a matrix, with numbers in the cells of up to 12 MACHs."""
    cells = [(i, j, x)
             for i, row in enumerate(rows)
             for j, x in enumerate(row)
             if x == x]  # without nan
    most = max(abs(x) for *_, x in cells)
    look = dict(vmin=-most, vmax=most, alpha=0.6, aspect='auto')
    image = axes.imshow(rows, 'PuOr', **look)
    if len(rows) > 12:
        axes.figure.colorbar(image, ax=axes)
        return
    axes.set(xticks=range(len(rows[0])), yticks=range(len(rows)))
    for i, j, x in cells:
        axes.text(j, i, format(x, form), ha='center', va='center', fontsize=6)


def make_figure(logs, panels=None):
    """The matplotlib Figure for print, 7 inches wide without its legend.

    Args:
        logs: of runs that count.
        panels: of PANELS; None: all that apply.

    Raises:
        ValueError: a panel does not apply.
    """
    from matplotlib import figure  # pylint: disable=import-outside-toplevel
    (curves, swept), (tables, note) = groups.curves(logs), groups.tables(logs)
    shown = [panel for panel in PANELS if panel in curves | tables]
    for panel in panels or ():
        if panel not in shown:
            raise ValueError(f'panel {panel} needs {PANELS[panel][-1]}')
    shown = list(dict.fromkeys(panels or shown))
    if not shown:
        raise ValueError('no panel applies to the logs that count')
    # Two panels share a row; a last one has the whole row.
    rows = [(shown[i:i + 2] * 2)[:2] for i in range(0, len(shown), 2)]
    whole = figure.Figure((7, 2.8 * len(rows)), layout='constrained')
    labels = [one[0] for panel in shown for one in curves.get(panel, ())]
    labels, handles = list(dict.fromkeys(labels)), {}
    for panel, axes in whole.subplot_mosaic(rows).items():
        x, y, _ = PANELS[panel]
        axes.set(xlabel=x or groups.SWEPT[swept], ylabel=y)
        if panel in tables:
            axes.set(title=f'{panel}, {note}')
            draw_table(axes, tables[panel], '.2f' if panel == 'worth' else 'd')
        else:
            draw_curves(axes, curves[panel], labels)
            (zoom if x else set_ticks)(axes, curves[panel])
        for line in axes.lines:
            handles.setdefault(line.get_label(), line)
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
