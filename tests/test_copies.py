"""`# Copied from` is a promise: the copy is still what it was copied from.

`# Copied from <path>` stands above a function, class or method and names the
file of the original, an object of the same name; or right below a module's
docstring, and then the whole file is a copy.
"""

import ast
import pathlib
import re
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENTS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph', 'asynchronous_sequence',
               'asynchronous_kgraph')
# Shorter ones are repeated without a mark: it would outweigh them.
MARKED_FROM = 6  # lines

MARKER = re.compile(r'[ \t]*# Copied from (\S+)[ \t]*')
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Module:
    """One source file: its definitions and its marks.

    Attributes:
        objects: (first line, qualified name, text) of each definition, in
            order; a text has its decorators but no indentation and no marks.
        marked: qualified name -> path of the original.
        whole: path of the original of the whole file, or None.
        stray: numbers of the lines of marks that stand above nothing.
        text: the whole file without marks.
    """

    def __init__(self, source):
        lines = source.splitlines()
        tree = ast.parse(source)
        self.objects, self.marked, self.whole, self.stray = [], {}, None, []
        self.text = self._without_marks(lines)
        self._collect(tree, '', lines)
        above = {first - 1: name for first, name, _ in self.objects}
        below = 1  # the line where a mark is one of the whole file
        if ast.get_docstring(tree) is not None:
            below = tree.body[0].end_lineno + 1
        while below <= len(lines) and not lines[below - 1].strip():
            below += 1
        for number, line in enumerate(lines, start=1):
            mark = MARKER.fullmatch(line)
            if mark and number in above:
                self.marked[above[number]] = mark[1]
            elif mark and number == below:
                self.whole = mark[1]
            elif 'copied from' in line.lower():
                self.stray.append(number)

    def _collect(self, node, prefix, lines):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, DEFINITIONS):
                first = min([child.lineno] +
                            [d.lineno for d in child.decorator_list])
                text = self._without_marks(lines[first - 1:child.end_lineno])
                self.objects.append((first, prefix + child.name, text))
                self._collect(child, f'{prefix}{child.name}.', lines)
            else:
                self._collect(child, prefix, lines)

    @staticmethod
    def _without_marks(lines):
        text = '\n'.join(line for line in lines if not MARKER.fullmatch(line))
        return textwrap.dedent(re.sub(r'\n{2,}', '\n\n', text)).strip()

    def is_marked(self, name):
        """Whether a mark covers it: its own, its class's or the file's."""
        parts = name.split('.')
        return self.whole is not None or any('.'.join(parts[:n]) in self.marked
                                             for n in range(1,
                                                            len(parts) + 1))


def problems_of_marks(sources):
    """What is wrong with the marks; `sources` is path -> text of the file."""
    modules = {path: Module(text) for path, text in sources.items()}
    found = []
    for path, module in modules.items():
        found += [f'{path}:{n}: marks nothing' for n in module.stray]
        marks = dict(module.marked)
        if module.whole is not None:
            marks[''] = module.whole
        for name, origin in marks.items():
            what = f'{path}: {name or "the file"}, copied from {origin},'
            original = modules.get(origin)
            if original is None or origin == path:
                found.append(f'{what} has no such original')
            elif not name:
                if module.text != original.text:
                    found.append(f'{what} has drifted')
            else:
                texts = originals(original, name)
                if not texts:
                    found.append(f'{what} has no original of its name')
                elif not any(text == the_text
                             for text in texts
                             for _, its_name, the_text in module.objects
                             if its_name == name):
                    found.append(f'{what} has drifted')
    return found


def originals(module, name):
    """Texts of what `name` can be a copy of: a method, that of any class."""
    owner, _, method = name.rpartition('.')
    return [
        text for _, other, text in module.objects
        if (other.rpartition('.')[2] == method and '.' in other
            if owner else other == name)
    ]


def problems_of_repetitions(sources, lines=MARKED_FROM):
    """Definitions that stand in several folders without a mark in all but one.

    Args:
        sources: path -> text of the file.
        lines: of how many lines on a definition is to be marked.
    """
    groups = {}
    for path, text in sources.items():
        module = Module(text)
        for _, name, body in module.objects:
            if body.count('\n') + 1 >= lines:
                key = (name.rpartition('.')[2], body)
                groups.setdefault(key, []).append(
                    (path, name, module.is_marked(name)))
    found = []
    for places in groups.values():
        folders = {path.split('/')[0] for path, _, _ in places}
        unmarked = [f'{path} {name}' for path, name, mark in places if not mark]
        if len(folders) > 1 and len(unmarked) > 1:
            found.append('the same, but not marked: ' + ', '.join(unmarked))
    return found


def repository():
    """Path -> text of every module of the five experiments."""
    return {
        f'{name}/{path.name}': path.read_text(encoding='utf-8')
        for name in EXPERIMENTS for path in sorted((ROOT / name).glob('*.py'))
    }


def test_no_copy_has_drifted():
    assert problems_of_marks(repository()) == []


def test_repetitions_are_marked():
    assert problems_of_repetitions(repository()) == []


def test_the_repository_has_marks():
    modules = map(Module, repository().values())
    assert sum(len(m.marked) + (m.whole is not None) for m in modules) > 20


@pytest.mark.parametrize('name, experiments', [('model.py', EXPERIMENTS),
                                               ('student.py', EXPERIMENTS),
                                               ('link.py', EXPERIMENTS[-2:])])
def test_shared_modules_are_the_same_in_every_folder(name, experiments):
    sources = repository()
    modules = {e: Module(sources[f'{e}/{name}']) for e in experiments}
    texts = {module.text for module in modules.values() if not module.marked}
    assert len(texts) <= 1


# What follows tests the checkers above.

ORIGINAL = '''\
"""An original."""

import functools


class Runner:
    """Runs."""

    @property
    def rate(self):
        """Steps a second."""
        return 1


@functools.cache
def double(x):
    """Twice x.

    Args:
        x: a number.
    """
    return 2 * x
'''
COPY = '''\
"""A copy."""

import functools


class Walker:
    """Walks."""

    # Copied from a/main.py
    @property
    def rate(self):
        """Steps a second."""
        return 1


# Copied from a/main.py
@functools.cache
def double(x):
    """Twice x.

    Args:
        x: a number.
    """
    return 2 * x
'''
WHOLE = ORIGINAL.replace('l."""\n', 'l."""\n# Copied from a/main.py\n', 1)


def check(copy):
    return problems_of_marks({'a/main.py': ORIGINAL, 'b/main.py': copy})


@pytest.mark.parametrize('copy', [COPY, WHOLE, WHOLE.replace('"\n#', '"\n\n#')])
def test_checker_accepts_true_copies(copy):
    assert 'Copied from' in copy
    assert not check(copy)


@pytest.mark.parametrize('copy, before, after, message', [
    (COPY, '2 * x', '2 + x', 'double, copied from a/main.py, has drifted'),
    (COPY, 'Twice x.', 'Two x.', 'double, copied from a/main.py, has drifted'),
    (COPY, '@functools.cache\n', '', 'double, copied from a/main.py, has dri'),
    (COPY, 'return 1', 'return 2', 'Walker.rate, copied from a/main.py, has d'),
    (COPY, '    @property\n', '', 'Walker.rate, copied from a/main.py, has dr'),
    (COPY, 'def double', 'def twice', 'has no original of its name'),
    (COPY, 'def rate', 'def speed', 'has no original of its name'),
    (COPY, 'def rate', 'def double', 'has no original of its name'),
    (COPY, 'from a/main.py', 'from a/gone.py', 'has no such original'),
    (COPY, 'from a/main.py', 'from b/main.py', 'has no such original'),
    (COPY, 'main.py\n@', 'main.py\n\n@', 'b/main.py:16: marks nothing'),
    (COPY, 'import', '# copied from a/main.py\nimport', 'main.py:3: marks no'),
    (COPY, '# Copied from a/main.py\n@', '# Copied from: a\n@',
     ':16: marks no'),
    (WHOLE, '2 * x', '2 + x', 'the file, copied from a/main.py, has drifted'),
    (WHOLE, 'An ori', 'The ori', 'the file, copied from a/main.py, has drif'),
    (WHOLE, 'return 1\n', 'return 1\n\nMORE = 1\n', 'the file, copied from'),
])
def test_checker_names_what_drifted(copy, before, after, message):
    assert before in copy
    found = check(copy.replace(before, after))
    assert found and message in found[0]


def test_repetition_checker():
    unmarked = re.sub(' *# Copied from a/main.py\n', '', COPY)
    sources = {'a/main.py': ORIGINAL, 'b/main.py': unmarked}
    found = problems_of_repetitions(sources)
    assert found == [
        'the same, but not marked: a/main.py double, b/main.py double'
    ]
    # Two copies, of which one is marked, are one too few; 4 lines are none.
    assert not problems_of_repetitions({'a/main.py': ORIGINAL, 'b/m.py': COPY})
    assert problems_of_repetitions(dict(sources, **{'c/main.py': COPY}))
    assert not problems_of_repetitions(sources, lines=9)
    # In one folder it is no matter of copies between experiments.
    assert not problems_of_repetitions({
        'a/main.py': ORIGINAL,
        'a/other.py': unmarked
    })
    # What is inside of a marked class or file has the mark of that.
    assert not problems_of_repetitions({'a/main.py': ORIGINAL, 'b/m.py': WHOLE})
    long = ORIGINAL.replace('return 1', 'a = 1\n        return a')
    marked = long.replace('class', '# Copied from a/main.py\nclass')
    marked = marked.replace('@functools', '# Copied from a/main.py\n@functools')
    assert problems_of_repetitions({'a/main.py': long, 'b/main.py': long})
    assert not problems_of_repetitions({'a/main.py': long, 'b/main.py': marked})
