"""Draws the logs of runs: python mach/main.py --compare LOG... --plot PICTURE

A line is the mean over the runs of one setting, in a band of +- their standard
deviation (n - 1), as in the table. Of `steps` and `seconds`, the y axis leaves
out what is far below the second half of the lines. `accuracy` and `rate` leave
out logs without the hyperparameter of their x axis. matplotlib is optional.
"""

import importlib.util
import itertools
import os
import pathlib
import textwrap

from mach import groups

# Panel -> its y axis, or for a matrix its x axis.
PANELS = dict.fromkeys(('steps', 'seconds'), 'validation accuracy, %')
PANELS |= dict(accuracy='real, % of test images')
PANELS |= dict(rate='rate, steps/s of one MACH')
PANELS |= dict(worth='child (worth: points)', classes='class (images)')
ROWS = ('steps', 'seconds'), ('accuracy', 'rate'), ('worth', 'classes')
UNITS = dict(k=', MACHs', latency=', s')
SUFFIXES = '.png', '.svg', '.pdf'
# Okabe and Ito's colours, but yellow: the colour-blind can tell them apart.
COLOURS = '#0072B2 #D55E00 #009E73 #CC79A7 #000000 #56B4E9 #E69F00'.split()
MARKERS, DASHES = 'osD^vPX*', dict(real='-', synthetic='--', rate='-')
STYLE = {'font.size': 9, 'axes.titlesize': 9, 'savefig.dpi': 200}
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
    """Gives the second half of the lines at least half of the y axis."""
    ends = [mean for *_, p in curves for _, mean, _ in p[len(p) // 2:]]
    low, high, margin = min(ends), max(ends), (max(ends) - min(ends)) / 5 + 0.1
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - 5 * margin), min(top, high + margin))


def set_ticks(axes, curves):
    """Puts ticks at each x; on a log axis if positive ones span decades."""
    values = sorted({x for *_, points in curves for x, *_ in points})
    positive = [x for x in values if x > 0]
    if positive and max(positive) >= 30 * min(positive):
        near = {} if positive == values else dict(linthresh=min(positive))
        axes.set_xscale('symlog' if near else 'log', **near)
    axes.set_xticks(values, [f'{x:g}' for x in values])
    axes.minorticks_off()


def draw_table(axes, rows, form):
    """Draws a matrix, with numbers in the cells of up to 12 MACHs."""
    cells = [(i, j, x)
             for i, row in enumerate(rows)
             for j, x in enumerate(row)
             if x == x]  # without nan
    most = max((abs(x) for *_, x in cells), default=0) or 1
    image = axes.imshow(rows, 'PuOr', vmin=-most, vmax=most, aspect='auto')
    if len(rows) > 12:
        axes.figure.colorbar(image, ax=axes)
        return
    axes.set(xticks=range(len(rows[0])), yticks=range(len(rows)))
    for i, j, x in cells:
        look = dict(color='white' if abs(x) > 0.6 * most else 'black')
        axes.text(j, i, format(x, form), ha='center', va='center', **look)


def make_figure(logs, panels=None):
    """The matplotlib Figure, 7 inches wide, for print.

    Args:
        logs: of runs that count.
        panels: of PANELS; None: all that apply.

    Raises:
        ValueError: a panel does not apply.
    """
    from matplotlib import figure  # pylint: disable=import-outside-toplevel
    (curves, swept), (tables, note) = groups.curves(logs), groups.tables(logs)
    found, rows, handles = curves | tables, [], {}
    shown = [panel for panel in panels or PANELS if found.get(panel)]
    for panel in panels or ():
        if panel not in shown:
            raise ValueError(f'panel {panel} needs {groups.NEEDS[panel]}')
    if not shown:
        raise ValueError('no panel applies to the logs that count')
    for pair in ROWS:
        row = [panel for panel in pair if panel in shown]
        if len(row) == 2 and len(tables.get(row[0], ())) <= 5:
            left = 2 if row[0] in tables else 3  # of six columns
            rows.append(row[:1] * left + row[1:] * (6 - left))
        else:
            rows += [[panel] * 6 for panel in row]
    # Curves are as high as a matrix of six MACHs.
    counts = [len(tables.get(row[0], range(6))) for row in rows]
    heights = [0.8 + 0.3 * min(12, count) for count in counts]
    labels = {one[0]: 0 for panel in shown for one in curves.get(panel, ())}
    legend = [0.2 + 0.15 * (len(label) // 90) for label in labels]
    whole = figure.Figure((7, sum(heights + legend)), layout='constrained')
    places = whole.subplot_mosaic(rows, height_ratios=heights)
    for panel, axes in places.items():
        if panel in tables:
            draw_table(axes, tables[panel], '.2f' if panel == 'worth' else 'd')
            names = f'{panel}, {note}', PANELS[panel], 'mach'
        else:
            draw_curves(axes, curves[panel], list(labels))
            x = f'{panel} (solid: real, dashed: synthetic)'
            x = x if panel in ROWS[0] else swept + UNITS.get(swept, '')
            names = '', x, PANELS[panel]
            (zoom if panel in ROWS[0] else set_ticks)(axes, curves[panel])
        axes.set(**dict(zip(('title', 'xlabel', 'ylabel'), names)))
        for line in axes.lines:
            handles.setdefault(textwrap.fill(line.get_label(), 90), line)
    if handles:
        whole.legend(handles.values(), handles, loc='outside lower left')
    return whole


def draw(picture, logs, panels=None):
    """Writes a picture; the same logs give the same SVG.

    The path has no `obstacle`; the rest is as in `make_figure`.
    """
    import matplotlib  # pylint: disable=import-outside-toplevel
    date = dict(svg='Date', pdf='CreationDate').get(str(picture)[-3:])
    with matplotlib.rc_context(STYLE):
        whole = make_figure(logs, panels)
        whole.savefig(picture, metadata={date: None} if date else None)
