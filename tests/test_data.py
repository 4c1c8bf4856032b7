"""Tests of mach/data.py; those of MNIST itself skip where it is not at hand."""

import gzip
import os
import pathlib
import shutil
import socket
import sys
import threading
import time

import pytest
import torch
from torch.nn import functional
from torchvision import datasets

from mach import data

ROOT = pathlib.Path(__file__).resolve().parent.parent
RAW = pathlib.Path(os.environ.get('MACH_DATA', ROOT / 'data')) / 'MNIST' / 'raw'
GZ = [name for name, _ in datasets.MNIST.resources]
has_mnist = pytest.mark.skipif(
    not all((RAW / name).exists() for name in GZ),
    reason='the four MNIST .gz files are neither in data nor in MACH_DATA')

draw_digits = data.draw_digits  # tests replace the module's


def digits(seed=0):
    """600 drawn images to train on, 100 to test."""
    return draw_digits(train=600, test=100, seed=seed)


@pytest.fixture(scope='module')
def drawn():
    return data.draw_digits(train=10000, test=2000)


@pytest.fixture
def few(monkeypatch):
    """Drawing in place of MNIST gives 600 images, to save time."""
    monkeypatch.setattr(data, 'draw_digits', digits)


@pytest.fixture
def offline(monkeypatch):
    """A try to reach the network fails as it does without one."""

    def refuse(*_, **__):
        raise socket.gaierror(-3, 'no network in this test')

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture
def folder(tmp_path, offline):
    """A data folder with the four .gz only."""
    raw = tmp_path / 'data' / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for name in GZ:
        shutil.copy(RAW / name, raw)
    return tmp_path / 'data'


def unlucky():
    """Labels with unequal class counts, shuffled; the smallest is 30."""
    counts = [30 + 7 * (c * c % 11) for c in range(10)]
    flat = torch.arange(10).repeat_interleave(torch.tensor(counts))
    return flat[torch.randperm(len(flat),
                               generator=torch.Generator().manual_seed(1))]


@has_mnist
def test_mnist_from_gz_alone(folder, capfd):
    before = torch.random.get_rng_state()
    mnist = data.load(folder, strict=True)
    assert capfd.readouterr() == ('', '')
    assert torch.equal(torch.random.get_rng_state(), before)
    assert mnist.name == 'MNIST'
    for part, n in ('train', 55000), ('validation', 5000), ('test', 10000):
        images = getattr(mnist, f'{part}_images')
        labels = getattr(mnist, f'{part}_labels')
        assert images.shape == (n, 784) and images.dtype == torch.uint8
        assert labels.shape == (n,) and labels.dtype == torch.int64
        assert images.is_contiguous() and labels.unique().numel() == 10
    assert mnist.validation_labels.bincount().tolist() == [500] * 10
    assert mnist.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    again = data.load(folder, strict=True)
    assert torch.equal(mnist.validation_images, again.validation_images)
    assert sorted(p.name for p in folder.iterdir()) == ['MNIST']
    both = torch.cat([mnist.train_images, mnist.validation_images])
    x = data.normalise(both[::7])
    assert abs(x.mean()) < .01 and abs(x.std() - 1) < .01


@has_mnist
def test_damaged_files_are_named_and_replaced(folder, capfd):
    data.load(folder, strict=True)
    raw = folder / 'MNIST' / 'raw'
    whole = (raw / 'train-images-idx3-ubyte').read_bytes()
    wrong = bytearray(whole)
    wrong[12345] ^= 1  # the size is right, and the header too
    (raw / 'train-images-idx3-ubyte').write_bytes(wrong)
    labels = (raw / 't10k-labels-idx1-ubyte').read_bytes()
    (raw / 't10k-labels-idx1-ubyte').write_bytes(labels[:5000])
    capfd.readouterr()
    data.load(folder, strict=True)
    out, err = capfd.readouterr()
    assert out == '' and len(err.splitlines()) == 2
    for name in 'train-images-idx3-ubyte', 't10k-labels-idx1-ubyte':
        assert f'{raw / name} is damaged' in err
        assert f'moved to {raw / name}.corrupt' in err
        assert (raw / f'{name}.corrupt').exists()
    assert (raw / 'train-images-idx3-ubyte').read_bytes() == whole
    assert (raw / 't10k-labels-idx1-ubyte').read_bytes() == labels


@has_mnist
@pytest.mark.parametrize('damage', ['truncated', 'other', 'empty'])
def test_damaged_gz(folder, capfd, few, damage):
    gz = folder / 'MNIST' / 'raw' / 't10k-labels-idx1-ubyte.gz'
    good = gz.read_bytes()
    gz.write_bytes({
        'truncated': good[:-100],
        'other': gzip.compress(b'no labels'),
        'empty': b''
    }[damage])
    dataset = data.load(folder, validation=0)
    out, err = capfd.readouterr()
    assert out == '' and dataset.name == 'drawn-digits'
    assert f'{gz} is damaged' in err and 'no network in this test' in err
    assert not gz.exists()
    assert (gz.parent / f'{gz.name}.corrupt').exists()
    # The good file in its place, as the warning asks: repaired.
    gz.write_bytes(good)
    assert data.load(folder, strict=True).name == 'MNIST'


@has_mnist
def test_unwritable_folder(folder, monkeypatch, capfd):
    # Permission bits do not bind every user, hence the pretence.
    access = os.access
    monkeypatch.setattr(
        os, 'access',
        lambda path, mode, **k: mode != os.W_OK and access(path, mode, **k))
    mkdir = os.mkdir

    def guarded(path, *args, **kwargs):
        assert folder not in pathlib.Path(path).parents
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, 'mkdir', guarded)
    before = sorted(folder.rglob('*'))
    assert data.load(folder, strict=True).name == 'MNIST'
    assert sorted(folder.rglob('*')) == before
    wrong = folder / 'MNIST' / 'raw' / 't10k-labels-idx1-ubyte'
    wrong.write_bytes(b'wrong')
    assert data.load(folder, strict=True).name == 'MNIST'
    assert f'{wrong} is damaged (MD5 sum), ignored' in capfd.readouterr().err
    assert wrong.read_bytes() == b'wrong'


def test_no_network_draws_digits(tmp_path, offline, few, capfd):
    target = tmp_path / 'new' / 'data'
    dataset = data.load(target, validation=50)
    out, err = capfd.readouterr()
    assert out == '' and len(err.splitlines()) == 1
    assert 'no network in this test' in err and str(target) in err
    assert 'train-images-idx3-ubyte.gz' in err and data.MIRROR in err
    assert dataset.name == 'drawn-digits' and len(dataset.train_images) == 550
    assert list(tmp_path.iterdir()) == []  # no empty folder left behind
    with pytest.raises(data.DataError, match='no network in this test'):
        data.load(target, strict=True)
    assert list(tmp_path.iterdir()) == []


def test_chatter_and_any_error_of_a_download(tmp_path, monkeypatch, few, capfd):

    def download(self):
        print('Downloading')
        raise ValueError('two\nlines')

    monkeypatch.setattr(datasets.MNIST, 'download', download)
    (tmp_path / 'kept').touch()
    assert data.load(tmp_path, validation=0).name == 'drawn-digits'
    out, err = capfd.readouterr()
    assert out == '' and len(err.splitlines()) == 1 and 'two lines' in err
    assert [p.name for p in tmp_path.iterdir()] == ['kept']


def test_hanging_download_ends_at_the_deadline(tmp_path, monkeypatch, few,
                                               capfd):
    release, seen = threading.Event(), []

    def hang(*_, **__):
        seen.append(socket.getdefaulttimeout())
        release.wait(30)
        raise socket.gaierror(-3, 'at last')

    monkeypatch.setattr(socket, 'getaddrinfo', hang)
    before, out = socket.getdefaulttimeout(), sys.stdout
    start = time.monotonic()
    with pytest.raises(data.DataError, match='no answer within 0.[45]'):
        data.load(tmp_path / 'data', strict=True, deadline=.5)
    assert time.monotonic() - start < 15  # of the 30 it hangs for
    assert socket.getdefaulttimeout() == before and sys.stdout is out
    release.set()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(5)
    # Stopped: it neither tried another mirror nor left files.
    assert len(seen) == 1 and 0 < seen[0] < .5
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ''


def test_interrupt_passes(tmp_path, monkeypatch):

    def interrupt(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.MNIST, 'download', lambda self: None)
    monkeypatch.setattr(threading.Thread, 'join', interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load(tmp_path / 'data')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('where', ['file', 'file/below', 'raw'])
def test_unusable_folder(tmp_path, offline, where):
    (tmp_path / 'file').touch()
    (tmp_path / 'raw' / 'MNIST').mkdir(parents=True)
    (tmp_path / 'raw' / 'MNIST' / 'raw').touch()
    with pytest.raises(data.DataError, match='cannot use the data folder') as e:
        data.load(tmp_path / where)
    assert str(tmp_path / where) in str(e.value)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='no /proc')
def test_folder_that_cannot_be_created(offline):
    with pytest.raises(data.DataError, match='cannot use the data folder'):
        data.load('/proc/nothing/here')


@pytest.mark.parametrize('deadline', [0, -1, float('nan')])
def test_bad_deadline(tmp_path, deadline):
    with pytest.raises(data.DataError, match='deadline'):
        data.load(tmp_path, deadline=deadline)


def test_validation_split(tmp_path, offline, monkeypatch):
    images, labels, *test = digits()
    labels = torch.arange(600) % 10
    images[:, :2] = torch.stack(
        [torch.arange(600) // 256,
         torch.arange(600) % 256], 1)  # name each
    monkeypatch.setattr(data, 'draw_digits', lambda: (images, labels, *test))

    def names(part):
        return part[:, 0].int() * 256 + part[:, 1]

    for count in 0, 1, 57, 590:
        loaded = []
        for seed in 1, 2:
            torch.manual_seed(seed)  # of no influence
            loaded.append(data.load(tmp_path, validation=count))
        a, b = loaded
        held, rest = names(a.validation_images), names(a.train_images)
        assert torch.equal(
            torch.cat([held, rest]).sort().values, torch.arange(600))
        assert torch.equal(held, names(b.validation_images))
        assert held.shape == (count,)
        assert a.validation_images.shape == (count, 784)
        assert torch.equal(a.validation_labels, labels[held.long()])
        assert torch.equal(a.train_labels, labels[rest.long()])
        counts = a.validation_labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
        assert a.train_labels.unique().numel() == 10
    for count in -1, 591, 600, 10**6:
        with pytest.raises(data.DataError, match='0 to 590'):
            data.load(tmp_path, validation=count)


def test_normalise():
    images = torch.arange(256, dtype=torch.uint8).repeat(4)[:784][None]
    x = data.normalise(images)
    assert x.shape == (1, 784) and x.dtype == torch.float32
    wanted = (images.double() / 255 - .1307) / .3081
    torch.testing.assert_close(x.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize('k', [1, 2, 7, 30])
def test_disjoint_shards(k):
    labels = unlucky()
    shards = data.make_shards(labels, k, 'disjoint', seed=3)
    assert len(shards) == k and shards[0].dtype == torch.int64
    assert torch.equal(
        torch.cat(shards).sort().values, torch.arange(len(labels)))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    counts = torch.stack([labels[s].bincount(minlength=10) for s in shards])
    assert counts.min() >= 1
    assert (counts.amax(0) - counts.amin(0)).max() <= 1
    again = data.make_shards(labels, k, 'disjoint', seed=3)
    assert all(torch.equal(a, b) for a, b in zip(shards, again))
    other = data.make_shards(labels, k, 'disjoint', seed=4)
    assert k == 1 or not torch.equal(shards[0], other[0])


def test_full_shards_and_bad_ones():
    labels = unlucky()
    for shard in data.make_shards(labels, 3, 'full', seed=0):
        assert torch.equal(shard, torch.arange(len(labels)))
    with pytest.raises(data.DataError, match='30 is the largest'):
        data.make_shards(labels, 31, 'disjoint', seed=0)
    for kind in 'full', 'disjoint':
        with pytest.raises(data.DataError, match='at least 1'):
            data.make_shards(labels, 0, kind, seed=0)
    with pytest.raises(data.DataError, match='half'):
        data.make_shards(labels, 2, 'half', seed=0)


def batches(n=50, size=8, seed=0):
    """Batches of n of 60 images; image i's pixels and label are all i."""
    labels = torch.arange(60)
    images = labels.to(torch.uint8)[:, None].repeat(1, 784)
    return data.Batches(images, labels, labels[60 - n:], size, seed)


@pytest.mark.parametrize('n, size', [(50, 8), (48, 8), (8, 8), (9, 8), (4, 1)])
def test_batches_cover_every_epoch(n, size):
    source, again, other = (batches(n, size, s) for s in (1, 1, 2))
    state = torch.random.get_rng_state()
    pairs = [source.next() for _ in range(3 * n)]
    assert torch.equal(state, torch.random.get_rng_state())
    for x, y in pairs:
        assert x.shape == (size, 784) and x.dtype == torch.float32
        assert y.shape == (size,) and y.dtype == torch.int64
        assert torch.equal(x, data.normalise(y[:, None].byte()).expand(-1, 784))
    seen = torch.cat([y for _, y in pairs]).view(-1, n)  # row: an epoch
    wanted = torch.arange(60 - n, 60)
    assert (seen.sort(dim=1).values == wanted).all()
    if n > 3:
        assert not torch.equal(seen[0], wanted)  # shuffled
        assert not torch.equal(seen[0], seen[1])  # anew
        assert any(not torch.equal(y, other.next()[1]) for _, y in pairs[:3])
    assert all(torch.equal(y, again.next()[1]) for _, y in pairs)


def test_batches_are_fresh_memory():
    source, twin = batches(8, 8), batches(8, 8)
    kept = [source.next() for _ in range(4)]
    copies = [(x.clone(), y.clone()) for x, y in kept]
    later = [source.next() for _ in range(4)]
    for x, y in later:
        x.zero_(), y.zero_()
    for (x, y), (x2, y2) in zip(kept, copies):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    pointers = {t.data_ptr() for pair in kept + later for t in pair}
    assert len(pointers) == 16
    # What was written to batches has not reached the source either.
    for _ in range(8):
        twin.next()
    assert torch.equal(source.next()[0], twin.next()[0])


def test_bad_batches():
    for n, size in (5, 0), (5, 6), (0, 8):
        with pytest.raises(data.DataError, match=f'a shard of {n} images'):
            batches(n, size)


def test_drawn_digits_are_reproducible(capfd):
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    a, b, c = digits(seed=5), digits(seed=5), digits(seed=6)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert all(torch.equal(s, t) for s, t in zip(a, b))
    assert not torch.equal(a[0], c[0]) and not torch.equal(a[1], c[1])
    assert capfd.readouterr() == ('', '')


def test_drawn_digits_look_like_mnist(drawn):
    for images, labels, n in ((*drawn[:2], 10000), (*drawn[2:], 2000)):
        assert images.shape == (n, 784) and images.dtype == torch.uint8
        assert labels.shape == (n,) and labels.dtype == torch.int64
        counts = labels.bincount()
        assert len(counts) == 10
        assert abs(counts - n / 10).max() < n / 10 * .2
    x = data.normalise(drawn[0])
    assert abs(x.mean()) < .2 and .7 < x.std() < 1.2
    assert len(drawn[0][:1000].unique(dim=0)) == 1000


def accuracy(drawn, hidden):
    """Test accuracy of a network with `hidden` hidden units (0: linear)."""
    generator = torch.Generator().manual_seed(0)
    sizes = [784, hidden, 10] if hidden else [784, 10]
    weights = [
        (torch.randn(a, b, generator=generator) / a**.5).requires_grad_()
        for a, b in zip(sizes, sizes[1:])
    ]

    def forward(x):
        for weight in weights[:-1]:
            x = (x @ weight).relu()
        return x @ weights[-1]

    steps = 800
    optimizer = torch.optim.Adam(weights, lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, .05, steps)
    source = data.Batches(*drawn[:2], torch.arange(len(drawn[0])), 64, 0)
    for _ in range(steps):
        x, y = source.next()
        optimizer.zero_grad()
        functional.cross_entropy(forward(x), y).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        guesses = forward(data.normalise(drawn[2])).argmax(1)
    return (guesses == drawn[3]).float().mean().item()


def test_drawn_digits_need_a_hidden_layer(drawn):
    linear, deep = accuracy(drawn, 0), accuracy(drawn, 128)
    assert .75 < linear < .94
    assert linear + .03 < deep < .999
