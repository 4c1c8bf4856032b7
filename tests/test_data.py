"""Tests of mach/data.py, most of them with a MNIST of 700 drawn images."""

import functools
import gzip
import hashlib
import http.server
import os
import pathlib
import signal
import socket
import sys
import tempfile
import threading
import time

import pytest
import torch
from torch.nn import functional
from torchvision import datasets

from mach import data

ROOT = pathlib.Path(__file__).resolve().parent.parent
IMAGES, _, _, LABELS = data.FILES  # names of the largest and a small file
# Shuffled labels; the smallest class has 30, others up to 100.
UNEQUAL = torch.tensor(
    [c for c in range(10) for _ in range(30 + 7 * (c * c % 11))])
UNEQUAL = UNEQUAL[torch.randperm(len(UNEQUAL),
                                 generator=torch.Generator().manual_seed(1))]
draw_digits = data.draw_digits  # tests replace the module's


@functools.cache
def digits(seed=0):
    """600 drawn images to train on, 100 to test."""
    return draw_digits(train=600, test=100, seed=seed)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def find_mnist():
    """The folder of MNIST's files; skips the test where there is none."""
    places = os.environ.get('MACH_DATA'), ROOT / 'data', ROOT / '../shared/data'
    for folder in places:
        if folder and pathlib.Path(folder, 'MNIST', 'raw').is_dir():
            return pathlib.Path(folder, 'MNIST', 'raw')
    return pytest.skip('MNIST is neither in data nor in MACH_DATA')


@pytest.fixture(autouse=True)
def fixture_safe(tmp_path_factory, monkeypatch):
    """No test hangs, or leaves temporary files."""

    def fail(*_):
        raise AssertionError('it hangs')

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    folder = tmp_path_factory.mktemp('temporary')
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    yield
    signal.alarm(0)
    assert not names(folder)


@pytest.fixture(name='offline')
def fixture_offline(monkeypatch):
    """No network, and few digits drawn in place of MNIST."""

    def refuse(*_, **__):
        raise socket.gaierror(-3, 'no network in this test')

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(data, 'draw_digits', digits)


@pytest.fixture(name='tiny')
def fixture_tiny(monkeypatch):
    """What counts as MNIST: 600 and 100 images. {name: bytes}."""
    contents, sums, resources = {}, {}, []
    for name, part in zip(data.FILES, digits(seed=1)):
        shape = (len(part), 28, 28) if 'images' in name else (len(part),)
        header = bytes([0, 0, 8, len(shape)])
        header += b''.join(n.to_bytes(4, 'big') for n in shape)
        content = header + part.to(torch.uint8).numpy().tobytes()
        contents[name] = content
        sums[name] = len(content), hashlib.md5(content).hexdigest()
        packed = gzip.compress(content, mtime=0)
        resources.append((f'{name}.gz', hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(data, 'FILES', sums)
    monkeypatch.setattr(datasets.MNIST, 'resources', resources)
    return contents


@pytest.fixture(name='raw')
def fixture_raw(tmp_path, tiny):
    """The folder of the files, with good .gz only, of MD5 sums of their own."""
    raw = tmp_path / 'data' / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for name, content in tiny.items():
        (raw / f'{name}.gz').write_bytes(gzip.compress(content, 1, mtime=1))
    return raw


def test_real_mnist(tmp_path, offline, capfd):
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for name in data.FILES:
        found = find_mnist() / f'{name}.gz'
        found = found if found.exists() else found.with_suffix('')
        (raw / found.name).symlink_to(found.resolve())
    before = torch.random.get_rng_state()
    mnist = data.load(tmp_path, strict=True)
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
    x = data.normalise(mnist.train_images[::7])
    assert abs(x.mean()) < .01 and abs(x.std() - 1) < .01


def test_gz_alone_are_unpacked(raw, tiny, offline, capfd):
    for _ in range(2):  # from the .gz, then from what they were unpacked to
        found = list(vars(data.load(raw.parent.parent, 0, True)).values())
        assert all(map(torch.equal, digits(seed=1), found[1:3] + found[5:]))
        for path in raw.glob('*.gz'):
            path.unlink()
        assert {p.name: p.read_bytes() for p in raw.iterdir()} == tiny
    assert capfd.readouterr() == ('', '')


def damage(path, how):
    good = path.read_bytes() if path.exists() else b''
    path.unlink(missing_ok=True)
    if how == 'fifo':
        os.mkfifo(path)
    elif how == 'folder':
        path.mkdir()
    else:
        bomb = gzip.compress(bytes(10**8)) if how == 'bomb' else b''
        path.write_bytes({
            'cut': good[:-9],
            'flipped': good[:-1] + b'?'
        }.get(how, bomb))


@pytest.mark.parametrize('how', ['cut', 'flipped', 'fifo', 'folder'])
def test_damaged_file_is_replaced_by_its_gz(raw, tiny, offline, capfd, how):
    wrong = raw / IMAGES
    wrong.write_bytes(tiny[IMAGES])
    damage(wrong, how)
    assert data.load(raw.parent.parent, 100, strict=True).name == 'MNIST'
    out, err = capfd.readouterr()
    assert out == '' and f'{wrong} is damaged' in err
    assert f'{wrong} moved to {wrong}.corrupt' in err
    assert (raw / f'{IMAGES}.corrupt').exists()
    assert wrong.read_bytes() == tiny[IMAGES]
    data.load(raw.parent.parent, 100, strict=True)
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('how', ['cut', 'empty', 'bomb', 'fifo'])
def test_damaged_gz_stays_while_offline(raw, offline, monkeypatch, capfd, how):
    read, lengths = gzip.GzipFile.read, []

    def watched(*args):
        content = read(*args)
        lengths.append(len(content))
        return content

    monkeypatch.setattr(gzip.GzipFile, 'read', watched)
    gz = raw / f'{LABELS}.gz'
    good, before = gz.read_bytes(), names(raw)
    damage(gz, how)
    assert data.load(raw.parent.parent, 0).name == 'drawn-digits'
    out, err = capfd.readouterr()
    assert out == '' and len(err.splitlines()) == 2
    assert f'{gz} is damaged' in err and 'no network in this test' in err
    assert names(raw) == before
    assert max(lengths) <= max(size for size, _ in data.FILES.values()) + 1
    # The good file in its place, as the warning asks: repaired.
    gz.unlink()
    gz.write_bytes(good)
    assert data.load(raw.parent.parent, 100, strict=True).name == 'MNIST'


@pytest.mark.parametrize('start', ['nothing', 'damaged'])
def test_download(tmp_path, raw, tiny, monkeypatch, capfd, start):
    asked = []

    class Mirror(http.server.BaseHTTPRequestHandler):

        def do_GET(self):
            asked.append(self.path)
            content = gzip.compress(tiny[self.path[1:-3]], mtime=0)
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    wanted = set(tiny)
    if start == 'nothing':
        raw = tmp_path / 'new' / 'data' / 'MNIST' / 'raw'
    else:
        wanted = {IMAGES, LABELS}
        damage(raw / f'{IMAGES}.gz', 'empty')
        damage(raw / f'{LABELS}.gz', 'fifo')
        damage(raw / LABELS, 'empty')
    monkeypatch.setenv('no_proxy', '*')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_server(('127.0.0.1', 0)) as closed:
            ports = closed.getsockname()[1], server.server_port
        monkeypatch.setattr(datasets.MNIST, 'mirrors',
                            [f'http://127.0.0.1:{port}/' for port in ports])
        assert data.load(raw.parent.parent, 100, strict=True).name == 'MNIST'
        server.shutdown()
    assert set(asked) == {f'/{name}.gz' for name in wanted}
    assert capfd.readouterr().out == ''
    assert all((raw / name).read_bytes() == tiny[name] for name in tiny)
    corrupt = {f'{IMAGES}.gz', f'{LABELS}.gz', LABELS}
    assert {p.name for p in raw.glob('*.corrupt')
           } == {f'{name}.corrupt' for name in corrupt if start == 'damaged'}
    assert not list(raw.glob('.*'))


def test_unwritable_folder(raw, offline, monkeypatch, capfd):
    # Permission bits do not bind every user, hence the pretence.
    mkdir = os.mkdir

    def guarded(path, *args, **options):
        if raw.parent.parent in pathlib.Path(path).parents:
            raise PermissionError(13, 'Permission denied', str(path))
        mkdir(path, *args, **options)

    monkeypatch.setattr(os, 'mkdir', guarded)
    wrong = raw / LABELS
    wrong.write_bytes(b'wrong')
    before = names(raw)
    assert data.load(raw.parent.parent, 100, strict=True).name == 'MNIST'
    assert names(raw) == before and wrong.read_bytes() == b'wrong'
    assert f'{wrong} is damaged' in capfd.readouterr().err


def test_no_network_draws_digits(tmp_path, offline, capfd):
    target = tmp_path / 'new' / 'data'
    dataset = data.load(target, validation=50)
    out, err = capfd.readouterr()
    assert out == '' and len(err.splitlines()) == 1
    assert 'no network in this test' in err and str(target) in err
    assert f'{IMAGES}.gz' in err and datasets.MNIST.mirrors[0] in err
    assert dataset.name == 'drawn-digits' and len(dataset.train_images) == 550
    assert not names(tmp_path)  # no empty folder left behind
    with pytest.raises(data.DataError, match='no network in this test'):
        data.load(target, strict=True)
    assert not names(tmp_path)


def test_chatter_and_any_error_of_a_download(tmp_path, monkeypatch, offline,
                                             capfd):

    def download(_):
        print('Downloading')
        raise ValueError('two\nlines')

    monkeypatch.setattr(datasets.MNIST, 'download', download)
    assert data.load(tmp_path, 0).name == 'drawn-digits'
    out, err = capfd.readouterr()
    assert out == '' and 'two lines' in err and tmp_path.is_dir()


def test_hanging_download_ends_at_the_deadline(tmp_path, monkeypatch, capfd):
    release, seen = threading.Event(), []

    def hang(*_, **__):
        seen.append(socket.getdefaulttimeout())
        release.wait(60)
        raise socket.timeout('at last')

    monkeypatch.setattr(socket, 'getaddrinfo', hang)
    monkeypatch.setattr(datasets.MNIST, 'mirrors', ['http://a/', 'http://b/'])
    before, out = socket.getdefaulttimeout(), sys.stdout
    threads, start = set(threading.enumerate()), time.monotonic()
    with pytest.raises(data.DataError, match='no answer within 0.5 s'):
        data.load(tmp_path / 'data', strict=True, deadline=.5)
    assert time.monotonic() - start < 30  # of the 60 it hangs for
    assert socket.getdefaulttimeout() == before and sys.stdout is out
    release.set()
    for thread in set(threading.enumerate()) - threads:
        thread.join(30)
    # Stopped: it neither tried another mirror nor left files.
    assert len(seen) == 1 and 0 < seen[0] < .5
    assert not names(tmp_path) and capfd.readouterr().out == ''


@pytest.mark.parametrize('what', ['download', 'unpacking'])
def test_interrupt_passes(tmp_path, raw, offline, monkeypatch, what):

    def interrupt(self, content=b''):
        if what == 'unpacking':
            self.touch()  # part of it
        raise KeyboardInterrupt

    folder, before = raw.parent.parent, names(raw)
    if what == 'download':
        folder = tmp_path / 'new'
        monkeypatch.setattr(datasets.MNIST, 'download', lambda self: None)
        monkeypatch.setattr(threading.Thread, 'join', interrupt)
    else:
        monkeypatch.setattr(pathlib.Path, 'write_bytes', interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load(folder)
    assert names(tmp_path) == ['data'] and names(raw) == before


@pytest.mark.parametrize('where', ['file', 'file/below', 'raw', '/proc/no/no'])
def test_unusable_folder(tmp_path, offline, where):
    if where.startswith('/proc') and not os.path.isdir('/proc'):
        pytest.skip('no folder in which none can be created')
    (tmp_path / 'file').touch()
    (tmp_path / 'raw' / 'MNIST').mkdir(parents=True)
    (tmp_path / 'raw' / 'MNIST' / 'raw').touch()
    with pytest.raises(data.DataError, match='cannot use the data folder') as e:
        data.load(tmp_path / where)
    assert str(tmp_path / where) in str(e.value)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('deadline', [0, -1, float('nan'), float('inf')])
def test_bad_deadline(tmp_path, deadline):
    with pytest.raises(data.DataError, match='deadline'):
        data.load(tmp_path, deadline=deadline)


def test_validation_split(tmp_path, offline, monkeypatch):
    images, _, *test = draw_digits(600, 100)
    labels = torch.arange(600) % 10
    images[:, 0], images[:, 1] = torch.arange(600) // 256, torch.arange(600)
    monkeypatch.setattr(data, 'draw_digits', lambda: (images, labels, *test))

    def numbers(part):  # the first two pixels name the image
        return part[:, 0].int() * 256 + part[:, 1]

    for count in 0, 1, 57, 590:
        torch.manual_seed(count)  # of no influence
        a = data.load(tmp_path, validation=count)
        b = data.load(tmp_path, validation=count)
        held, rest = numbers(a.validation_images), numbers(a.train_images)
        assert torch.equal(
            torch.cat([held, rest]).sort().values, torch.arange(600))
        assert torch.equal(held, numbers(b.validation_images))
        assert a.validation_images.shape == (count, 784)
        assert torch.equal(a.validation_labels, labels[held.long()])
        assert torch.equal(a.train_labels, labels[rest.long()])
        counts = a.validation_labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
        assert a.train_labels.unique().numel() == 10
        # Recorded results had these held out.
        assert count != 57 or held[:6].tolist() == [0, 4, 15, 23, 27, 29]
    for count in -1, 591, 10**6:
        with pytest.raises(data.DataError, match='0 to 590'):
            data.load(tmp_path, validation=count)


def test_recorded_results_still_hold():
    # What past runs were given: to change it is to void their results.
    labels = torch.arange(600) * 7 % 10
    shards = data.make_shards(labels, 3, 'disjoint', seed=4)
    assert shards[1][:5].tolist() == [1, 2, 3, 4, 8]
    images = torch.zeros(600, 784, dtype=torch.uint8)
    dataset = data.Dataset('', images, torch.arange(600), *[None] * 4)
    source = data.deal(dataset, 3, 'full', 5, seed=2)[1]
    assert source.next()[1].tolist() == [368, 318, 317, 540, 496]
    assert draw_digits(90, 10)[1][:8].tolist() == [5, 5, 2, 6, 3, 1, 8, 5]


def test_normalise():
    images = torch.arange(256, dtype=torch.uint8).repeat(4)[:784][None]
    x = data.normalise(images)
    assert x.shape == (1, 784) and x.dtype == torch.float32
    wanted = (images.double() / 255 - .1307) / .3081
    torch.testing.assert_close(x.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize('k', [1, 2, 7, 30])
def test_disjoint_shards(k):
    shards = data.make_shards(UNEQUAL, k, 'disjoint', seed=3)
    assert len(shards) == k and shards[0].dtype == torch.int64
    assert torch.equal(
        torch.cat(shards).sort().values, torch.arange(len(UNEQUAL)))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    counts = torch.stack([UNEQUAL[s].bincount(minlength=10) for s in shards])
    assert counts.min() >= 1 and (counts.amax(0) - counts.amin(0)).max() <= 1
    again = data.make_shards(UNEQUAL, k, 'disjoint', seed=3)
    assert all(map(torch.equal, shards, again))
    other = data.make_shards(UNEQUAL, k, 'disjoint', seed=4)
    assert k == 1 or not torch.equal(shards[0], other[0])


def test_full_shards_and_bad_ones():
    for shard in data.make_shards(UNEQUAL, 3, 'full'):
        assert torch.equal(shard, torch.arange(len(UNEQUAL)))
    for k, kind, message in ((31, 'disjoint', '30 is the largest'),
                             (0, 'disjoint', 'at least 1'),
                             (0, 'full', 'at least 1'), (2, 'half', 'half')):
        with pytest.raises(data.DataError, match=message):
            data.make_shards(UNEQUAL, k, kind)


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
    assert not torch.equal(seen[0], wanted)  # shuffled
    assert not torch.equal(seen[0], seen[1])  # anew
    assert any(not torch.equal(y, other.next()[1]) for _, y in pairs[:3])
    assert all(torch.equal(y, again.next()[1]) for _, y in pairs)


def test_batches_are_fresh_memory():
    source, twin = batches(8, 8), batches(8, 8)
    kept = [tensor for _ in range(4) for tensor in source.next()]
    copies = [tensor.clone() for tensor in kept]
    later = [tensor.zero_() for _ in range(4) for tensor in source.next()]
    assert all(map(torch.equal, kept, copies))
    assert len({tensor.data_ptr() for tensor in kept + later}) == 16
    # What was written to batches has not reached the source either.
    for _ in range(8):
        twin.next()
    assert all(map(torch.equal, source.next(), twin.next()))


def test_batches_go_on_where_others_were():
    source, others = batches(seed=1), batches(n=49)
    for steps in (0, 3, 10):  # in the second epoch
        for _ in range(steps):
            source.next()
        state, twin = source.state(), batches(seed=2)
        storage = state['queue'].untyped_storage()
        assert storage.nbytes() == state['queue'].nbytes  # no more is saved
        expected = [source.next() for _ in range(20)]
        twin.restore(state)
        for batch in expected:
            assert all(map(torch.equal, batch, twin.next()))
    with pytest.raises(data.DataError, match='images are others'):
        others.restore(state)


@pytest.mark.parametrize('n, size', [(5, 0), (5, 6), (0, 8)])
def test_bad_batches(n, size):
    with pytest.raises(data.DataError, match=f'a shard of {n} images'):
        batches(n, size)


def test_deal():
    images, labels, *_ = digits()
    dataset = data.Dataset('', images, labels, *[None] * 4)
    shards = data.make_shards(labels, 3, 'disjoint', 2)
    dealt = data.deal(dataset, 3, 'disjoint', 9, 2)
    for i, (source, shard) in enumerate(zip(dealt, shards, strict=True)):
        twin = data.Batches(images, labels, shard, 9, 2 * 1009 + i)
        assert all(map(torch.equal, source.next(), twin.next()))
    for k, size in (0, 9), (100, 1), (3, 601):
        with pytest.raises(data.DataError):
            data.deal(dataset, k, 'disjoint', size, 2)


def test_drawn_digits_are_reproducible(capfd):
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    a, b, c = (data.draw_digits(600, 100, seed) for seed in (5, 5, 6))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a[0], c[0]) and not torch.equal(a[1], c[1])
    assert capfd.readouterr() == ('', '')


def accuracy(drawn, *layers):
    """Test accuracy of a network of these layers, trained on `drawn`."""
    network = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    source = data.Batches(*drawn[:2], torch.arange(len(drawn[0])), 64, 0)
    for _ in range(600):
        x, y = source.next()
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    guesses = network(data.normalise(drawn[2])).argmax(1)
    return (guesses == drawn[3]).float().mean().item()


def test_drawn_digits_are_like_mnist():
    drawn = data.draw_digits(10000, 2000)
    for images, labels, n in ((*drawn[:2], 10000), (*drawn[2:], 2000)):
        assert images.shape == (n, 784) and images.dtype == torch.uint8
        assert labels.shape == (n,) and labels.dtype == torch.int64
        assert abs(labels.bincount(minlength=10) - n / 10).max() < n / 10 * .2
    x = data.normalise(drawn[0])
    assert abs(x.mean()) < .2 and .7 < x.std() < 1.2
    assert len(drawn[0][:1000].unique(dim=0)) == 1000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = accuracy(drawn, torch.nn.Linear(784, 10))
        deep = accuracy(drawn, torch.nn.Linear(784, 128), torch.nn.ReLU(),
                        torch.nn.Linear(128, 10))
    assert .75 < linear < .94 and linear + .03 < deep < .999
