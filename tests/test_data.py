"""Tests of mach/data.py. Most use a MNIST of 700 drawn images."""

import functools
import errno
import gzip
import hashlib
import http.server
import itertools
import math
import os
import pathlib
import shutil
import socket
import tempfile
import threading
import time
import zlib

import pytest
import torch
from torch.nn import functional
from torchvision import datasets

import conftest
from mach import data

IMAGES, LABELS = 'train-images-idx3-ubyte', 't10k-labels-idx1-ubyte'
draw_digits = functools.cache(data.draw_digits)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def fixture_safe(tmp_path_factory, monkeypatch, capfd):
    """No test prints to stdout, uses torch's generator or litters."""
    folder = tmp_path_factory.mktemp('temporary')
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr().out == '' and not names(folder)


@pytest.fixture(name='offline')
def fixture_offline(monkeypatch):
    """There is no network, and few digits are drawn in place of MNIST."""

    def refuse(host, *more, find=socket.getaddrinfo, **names):
        if host == '127.0.0.1':  # threads of other tests still look for peers
            return find(host, *more, **names)
        data.datasets.mnist.print('torchvision may print')
        raise socket.gaierror(-3, 'no network in this test')

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(data, 'draw_digits', lambda: draw_digits(600, 100))


@pytest.fixture(name='tiny')
def fixture_tiny(monkeypatch):
    """Makes 600 and 100 images count as MNIST: {name: bytes}."""
    contents, resources = {}, []
    for name, part in zip(data.SIZES, draw_digits(600, 100, 1)):
        shape = (len(part), 28, 28) if 'images' in name else (len(part),)
        header = bytes([0, 0, 8, len(shape)])
        header += b''.join(n.to_bytes(4, 'big') for n in shape)
        contents[name] = header + part.to(torch.uint8).numpy().tobytes()
        packed = gzip.compress(contents[name], mtime=0)
        contents[f'{name}.gz'] = packed
        resources.append((f'{name}.gz', hashlib.md5(packed).hexdigest()))
    sizes = {name: len(contents[name]) for name in data.SIZES}
    monkeypatch.setattr(data, 'SIZES', sizes)
    monkeypatch.setattr(datasets.MNIST, 'resources', resources)
    return contents


@pytest.fixture(name='raw')
def fixture_raw(tmp_path, tiny):
    """The folder of MNIST's files, with the four .gz only."""
    raw = tmp_path / 'data' / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for name, _ in datasets.MNIST.resources:
        (raw / name).write_bytes(tiny[name])
    return raw


@pytest.mark.skipif(not conftest.DATA, reason='no MNIST here')
def test_real_mnist(capfd):
    mnist = data.load(conftest.DATA)
    assert mnist.name == 'MNIST' and capfd.readouterr().err == ''
    parts = list(vars(mnist).values())[1:]
    assert [len(part) for part in parts[::2]] == [55000, 5000, 10000]
    # Recorded results had these images and held these out.
    assert [zlib.crc32(part.numpy()) for part in parts] == [
        2944557948, 2262446005, 2382516298, 1987972355, 3838467927, 152820446
    ]


def test_gz_alone_are_unpacked(raw, tiny, offline, capfd):
    for _ in range(2):  # from the .gz, then from the unpacked files
        found = list(vars(data.load(raw.parent.parent, 0, True)).values())
        wanted = draw_digits(600, 100, 1)
        assert all(map(torch.equal, wanted, found[1:3] + found[5:]))
        for path in raw.glob('*.gz'):
            path.unlink()
        assert all(
            (raw / name).read_bytes() == tiny[name] for name in names(raw))
    assert len(names(raw)) == 4 and capfd.readouterr().err == ''


def test_folder_that_cannot_be_written(raw, offline, monkeypatch):

    def refuse(*_):
        raise PermissionError(13, 'Permission denied', str(raw))

    before = names(raw)
    monkeypatch.setattr(pathlib.Path, 'replace', refuse)
    assert data.load(raw.parent.parent, 0).name == 'MNIST'
    assert names(raw) == before


@pytest.mark.parametrize('how', ['cut', 'long', 'zeros', 'fifo'])
def test_damaged_file_is_replaced(raw, tiny, offline, capfd, how):
    folder, path, good = raw.parent.parent, raw / IMAGES, tiny[IMAGES]
    data.load(folder, 0)
    path.unlink()
    if how == 'fifo':
        os.mkfifo(path)
    else:  # zeros are what a crash of the machine leaves
        path.write_bytes({
            'cut': good[:-9],
            'long': good + b'?'
        }.get(how, bytes(len(good))))
    data.load(folder, 0)
    assert f'{path} is damaged' in capfd.readouterr().err
    assert path.read_bytes() == good
    data.load(folder, 0)
    assert capfd.readouterr().err == ''


def test_damaged_files_stay_without_network(raw, offline, capfd):
    damaged = raw / f'{LABELS}.gz', raw / LABELS
    for path in damaged:
        path.write_bytes(b'half')
    before = names(raw)
    assert data.load(raw.parent.parent, 0).name == 'drawn-digits'
    err = capfd.readouterr().err
    assert all(f'{path} is damaged' in err for path in damaged)
    assert names(raw) == before
    assert all(path.read_bytes() == b'half' for path in damaged)


def test_download(tmp_path, tiny, monkeypatch):
    asked, raw = [], tmp_path / 'new' / 'data' / 'MNIST' / 'raw'

    class Mirror(http.server.BaseHTTPRequestHandler):

        def do_GET(self):
            asked.append(self.path[1:])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(tiny[self.path[1:]])

        def log_message(self, *_):
            pass

    monkeypatch.setenv('no_proxy', '*')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_server(('127.0.0.1', 0)) as dead:
            ports = dead.getsockname()[1], server.server_port
        monkeypatch.setattr(datasets.MNIST, 'mirrors',
                            [f'http://127.0.0.1:{port}/' for port in ports])
        for start in 'nothing', 'damaged':
            data.load(raw.parent.parent, 0)
            assert names(raw) == sorted(data.SIZES)  # and nothing else
            assert all(
                (raw / name).read_bytes() == tiny[name] for name in data.SIZES)
            assert f'{IMAGES}.gz' in asked, start
            asked.clear()
            (raw / IMAGES).write_bytes(b'half')
        server.shutdown()


def test_no_network_draws_digits(tmp_path, offline, capfd):
    target = tmp_path / 'new' / 'data'
    dataset = data.load(target, validation=50)
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and 'Error downloading' in err
    for fix in f'{IMAGES}.gz', datasets.MNIST.mirrors[0], str(target):
        assert fix in err
    assert dataset.name == 'drawn-digits' and len(dataset.train_images) == 550
    assert not names(tmp_path)  # no empty folder is left


def test_a_full_disk_is_no_missing_network(tmp_path, offline, monkeypatch):

    def download(_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(datasets.MNIST, 'download', download)
    with pytest.raises(data.DataError, match='the temporary folder .*No space'):
        data.load(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert data.load(validation=0).name == 'drawn-digits'  # from `data`


def test_hanging_download_ends_at_the_deadline(tmp_path, monkeypatch, capfd):
    release, seen = threading.Event(), []

    def hang(host, *more, find=socket.getaddrinfo, **names):
        if host == '127.0.0.1':  # threads of other tests still look for peers
            return find(host, *more, **names)
        seen.append(socket.getdefaulttimeout())
        release.wait(60)
        raise socket.timeout('at last')

    monkeypatch.setattr(socket, 'getaddrinfo', hang)
    monkeypatch.setattr(datasets.MNIST, 'mirrors', ['http://a/', 'http://b/'])
    before, threads = socket.getdefaulttimeout(), set(threading.enumerate())
    start = time.monotonic()
    monkeypatch.setattr(data, 'draw_digits', lambda: draw_digits(600, 100))
    assert data.load(tmp_path, 0, deadline=.5).name == 'drawn-digits'
    assert 'no answer within 0.5 s' in capfd.readouterr().err
    assert time.monotonic() - start < 30  # of the 60 s that it hangs for
    assert socket.getdefaulttimeout() == before
    release.set()
    started = [one for one in threading.enumerate() if one.ident]
    for thread in set(started) - threads:
        thread.join(30)
    assert len(seen) == 1 and 0 < seen[0] < .5  # it tried no other mirror


def test_interrupt_while_saving_leaves_no_half_file(raw, offline, monkeypatch):

    def interrupt(source, target):
        if target.suffix == '.gz':
            return copyfile(source, target)
        target.write_bytes(b'half')
        raise KeyboardInterrupt

    copyfile, before = shutil.copyfile, names(raw)
    monkeypatch.setattr(shutil, 'copyfile', interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load(raw.parent.parent)
    assert names(raw) == before


@pytest.mark.parametrize(
    'where', ['data', 'file', 'file/below', 'link', '/proc/nope/nope'])
def test_unusable_folder(tmp_path, raw, monkeypatch, where):
    monkeypatch.setattr(data, '_fetch', lambda *_: pytest.fail('a download'))
    shutil.rmtree(raw)
    for path in raw, tmp_path / 'file':
        path.touch()
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(data.DataError, match='cannot use the data folder') as e:
        data.load(tmp_path / where)
    assert str(tmp_path / where) in str(e.value)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('network', [True, False])
def test_no_fault_of_the_default_folder_ends_a_run(raw, offline, monkeypatch,
                                                   capfd, network):

    def fetch(folder, *more, then=data._fetch):
        for path in raw.glob('*.gz') if network else ():
            shutil.copy(path, pathlib.Path(folder, 'MNIST', 'raw'))
        then(folder, *more)

    monkeypatch.setattr(data, '_fetch', fetch)
    (raw / 'data').touch()
    for place in raw, '/proc':  # there, `data` is a file or cannot be made
        monkeypatch.chdir(place)
        name = data.load(validation=0).name
        assert name == ('MNIST' if network else 'drawn-digits')
        assert bool(capfd.readouterr().err) != network


def test_validation_is_even_and_complete(tmp_path, offline):
    every = draw_digits(600, 100)[0].unique(dim=0)
    most = 10 * (int(draw_digits(600, 100)[1].bincount().min()) - 1)
    for count in 0, 1, 57, most:
        one = data.load(tmp_path, validation=count)
        assert one.validation_images.shape == (count, 784)
        both = torch.cat([one.validation_images, one.train_images])
        assert torch.equal(both.unique(dim=0), every)
        counts = one.validation_labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
    for count in -1, most + 1:  # a class would lack training images
        with pytest.raises(data.DataError, match=f'0 to {most}'):
            data.load(tmp_path, validation=count)


def test_normalise_and_denormalise():
    images = torch.arange(256, dtype=torch.uint8).repeat(4)[:784][None]
    x = data.normalise(images)
    assert x.shape == (1, 784) and x.dtype == torch.float32
    wanted = (images.double() / 255 - .1307) / .3081
    torch.testing.assert_close(x.double(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(data.denormalise(x), images)
    assert data.denormalise(torch.tensor([-9., 9.])).tolist() == [0, 255]


@pytest.mark.parametrize('k', [1, 2, 7, 30])
def test_shards(k):
    labels = torch.cat(
        [torch.full((30 + 7 * (c * c % 11),), c) for c in range(10)])
    shards = data.make_shards(labels, k, 'disjoint', seed=3)
    assert len(shards) == k and shards[0].dtype == torch.int64
    assert torch.equal(
        torch.cat(shards).sort().values, torch.arange(len(labels)))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    counts = torch.stack([labels[s].bincount(minlength=10) for s in shards])
    assert counts.min() >= 1 and (counts.amax(0) - counts.amin(0)).max() <= 1
    other = data.make_shards(labels, k, seed=4)
    assert k == 1 or not torch.equal(shards[0], other[0])
    for shard in data.make_shards(labels, k, 'full'):
        assert torch.equal(shard, torch.arange(len(labels)))
    for bad, kind, message in ((31, 'disjoint', '30 is the largest'),
                               (0, 'full', 'at least 1'), (k, 'half', 'half')):
        with pytest.raises(data.DataError, match=message):
            data.make_shards(labels, bad, kind)


@pytest.mark.parametrize('k, skew', [(1, 0.5), (5, 0.5), (5, 0.01), (20, 1e6),
                                     (30, 0.1), (600, 0.1)])
def test_skewed_shards(k, skew):
    labels = torch.arange(6000) % 10
    shards = data.make_shards(labels, k, 'skewed', 3, skew)
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(6000))
    assert all(torch.equal(shard, shard.unique()) for shard in shards)
    counts = torch.stack([labels[s].bincount(minlength=10) for s in shards])
    assert counts.min() >= max(12 // k, 1)  # 2% of 600 are 12
    spread = counts.double().std(0, correction=0) / (600 / k)
    if 1 < k < 600:  # a Dirichlet draw over k has this deviation
        wanted = math.sqrt((k - 1) / (k * skew + 1))
        assert spread.mean() == pytest.approx(wanted, abs=0.05 + 0.2 * wanted)
    other, = data.make_shards(labels, k, 'skewed', 4, skew)[:1]
    assert k == 1 or not torch.equal(shards[0], other)
    with pytest.raises(data.DataError, match='600 is the largest'):
        data.make_shards(labels, 601, 'skewed', 3, skew)


def test_the_batch_size_moves_no_image():
    dataset = data.Dataset('x', torch.zeros(600, 784),
                           torch.arange(600) % 10, *[None] * 4)

    def classes(size):
        made = data.deal(dataset, 20, 'skewed', size, 0, skew=0.1)
        return torch.stack([one.classes for one in made])

    counts = classes(1)
    least = int(counts.sum(1).min())
    assert counts[0].sum() > least  # the first shard is not the smallest
    assert torch.equal(classes(least), counts)
    with pytest.raises(data.DataError, match=f'size 30 .*1 to {least} does'):
        classes(30)


def test_batches_know_their_classes():
    dataset = data.Dataset('x', torch.zeros(60, 784),
                           torch.arange(60) % 10, *[None] * 4)
    made = data.deal(dataset, 3, 'skewed', 4, 0, skew=0.1)
    assert sum(one.classes for one in made).tolist() == [6] * 10
    for one in made:
        size = int(one.classes.sum())
        assert 4 <= size
        seen = torch.cat([next(one)[1] for _ in range(size)])  # 4 epochs
        assert torch.equal(seen.bincount(minlength=10), 4 * one.classes)


def make_batches(n=50, size=8, seed=1):
    """The last n of 60 images. All pixels and the label of image i are i."""
    labels = torch.arange(60)
    images = labels.to(torch.uint8)[:, None].repeat(1, 784)
    return data.Batches(images, labels, labels[60 - n:], size, seed)


@pytest.mark.parametrize('n, size', [(50, 8), (48, 8), (8, 8), (9, 8), (4, 1)])
def test_batches_cover_every_epoch(n, size):
    source, other = iter(make_batches(n, size)), make_batches(n, size, seed=2)
    pairs = [next(source) for _ in range(3 * n)]
    for x, y in pairs:  # a batch that shared memory with another would differ
        assert x.shape == (size, 784) and x.dtype == torch.float32
        assert y.shape == (size,) and y.dtype == torch.int64
        assert torch.equal(x, data.normalise(y[:, None].byte()).expand(-1, 784))
        x.zero_()
    seen = torch.cat([y for _, y in pairs]).view(-1, n)  # a row is an epoch
    wanted = torch.arange(60 - n, 60)
    assert (seen.sort(dim=1).values == wanted).all()
    assert not torch.equal(seen[0], wanted)
    assert not torch.equal(seen[0], seen[1])
    assert any(not torch.equal(y, next(other)[1]) for _, y in pairs[:3])


def test_batches_continue_from_a_state():
    source = make_batches()
    for steps in 0, 3, 10:  # the last is in the second epoch
        for _ in range(steps):
            next(source)
        state, twin = source.state_dict(), make_batches(seed=2)
        storage = state['queue'].untyped_storage()
        assert storage.nbytes() == state['queue'].nbytes  # no more is saved
        expected = [next(source) for _ in range(20)]
        twin.load_state_dict(state)
        for batch in expected:
            assert all(map(torch.equal, batch, next(twin)))
    with pytest.raises(data.DataError, match='labels have changed'):
        make_batches(n=49).load_state_dict(state)


def test_recorded_results_still_hold():
    images = torch.zeros(600, 784, dtype=torch.uint8)
    dataset = data.Dataset('', images, torch.arange(600) % 10, *[None] * 4)
    shards = data.make_shards(dataset.train_labels, 3, seed=4)
    assert shards[1][:5].tolist() == [1, 2, 3, 4, 8]
    source = data.deal(dataset, 3, 'disjoint', 9, seed=2)[1]
    assert next(source)[1].tolist() == [4, 6, 9, 8, 1, 2, 7, 5, 0]
    for size in 0, 201:
        with pytest.raises(data.DataError,
                           match='smallest shard of 200 images'):
            data.deal(dataset, 3, 'disjoint', size, 2)
    images, labels, *_ = data.draw_digits(90, 10)
    # Older versions of torch round a few pixels to the next grey.
    assert images.float().mean().item() == pytest.approx(34.637, abs=.01)
    assert labels[:8].tolist() == [5, 5, 2, 6, 3, 1, 8, 5]
    assert not torch.equal(images, data.draw_digits(90, 10, seed=1)[0])


def test_drawn_digits_can_be_learnt():
    images, labels, test_images, test_labels = data.draw_digits(10000, 2000)
    assert images.dtype == torch.uint8 and len(images.unique(dim=0)) == 10000
    assert abs(labels.bincount(minlength=10) - 1000).max() < 200
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(784, 128),
                                      torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    batches = data.Batches(images, labels, torch.arange(10000), 64, 0)
    for x, y in itertools.islice(batches, 600):
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    guesses = network(data.normalise(test_images)).argmax(1)
    assert .9 < (guesses == test_labels).float().mean() < .999
