"""--crop_cycle: crops that come again, and codes that are kept for them."""

import json
import shutil

import numpy as np
import pytest
import torch
from many_processes import one_process, two_processes
from refusals import refused, user_reads
from tiny_pretraining import PLAIN, pixel_flags
from tiny_runs import (
    as_flags,
    assert_same_weights,
    checkpoint,
    kill_after,
    log_lines,
    photos,
    pretraining_flags,
)

import encode_images
import engine_for_crop_cycle
import estimate
import modeling_dvae
import run_beitv2_pretraining
from data_pipeline import code_cache
from data_pipeline.code_cache import CodeCache, Row
from data_pipeline.crop_cycle import CropCycle
from data_pipeline.crops import PretrainingViews
from data_pipeline.files import collate
from engine_for_crop_cycle import CachedTokens
from engine_for_pretraining import Tokens
from modeling_vqkd import VQKD

EPOCHS = as_flags(epochs=4, save_ckpt_freq=99)
ABOUT = {"of": "nothing"}


def flags(data, out, tokenizer_weight, *more, cycle=2):
    """16 photos in batches of 5: one is left out of each epoch."""
    cycles = as_flags(crop_cycle=cycle, batch_size=5, second_interpolation="bilinear")
    return pretraining_flags(data, out, tokenizer_weight, *EPOCHS, *cycles, *more)


def pretrain(*args, **kwargs):
    run_beitv2_pretraining.main(flags(*args, **kwargs))


def build(*args, **kwargs):
    """The stage's target, with its data set, and the run's loader."""
    trainer = run_beitv2_pretraining.build(run_beitv2_pretraining.parse_flags(flags(*args, **kwargs)))
    return trainer.stage.target, trainer.data


def stored(out):
    """(K, images) of rows."""
    return np.stack([np.load(path) for path in sorted((out / "codes").glob("crop-*.npy"))])


def assert_same_runs(first, second):
    assert_same_weights(first / "checkpoint.pth", second / "checkpoint.pth")
    for one, two in zip(log_lines(first), log_lines(second), strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {
            k: v for k, v in two.items() if k != "seconds"
        }


class Counts:
    """How many images the tokenizer encoded, and how many views were made for it, in
    each epoch.
    """

    def __init__(self, monkeypatch):
        self.encoded, self.views = [0], [0]
        encode, crop, end = VQKD.get_codebook_indices, PretrainingViews.crop_image, CachedTokens.end_epoch

        def counted_encode(model, x, *more):
            self.encoded[-1] += len(x)
            return encode(model, x, *more)

        def counted_crop(views, loaded, for_tokenizer=True):
            self.views[-1] += for_tokenizer
            return crop(views, loaded, for_tokenizer)

        def counted_end(target):
            found = end(target)
            self.encoded.append(0)
            self.views.append(0)
            return found

        monkeypatch.setattr(VQKD, "get_codebook_indices", counted_encode)
        monkeypatch.setattr(PretrainingViews, "crop_image", counted_crop)
        monkeypatch.setattr(CachedTokens, "end_epoch", counted_end)


@pytest.fixture(scope="module")
def undisturbed(data, tokenizer_weight, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    pretrain(data, out, tokenizer_weight)
    return out


# ── what is repeated, and what is not ──


def test_crops_come_again_and_masks_do_not(data, tokenizer_weight, tmp_path):
    target, _ = build(data, tmp_path, tokenizer_weight, cycle=2)
    images, views, masks = [], [], []
    for epoch in range(6):
        batch = collate(target.dataset.__getitems__([(epoch, index) for index in range(16)]))
        images.append(batch["image"])
        views.append(batch["tokenizer_image"])
        masks.append(batch["mask"])
    for epoch in range(4):
        for seen in (images, views):
            assert torch.equal(seen[epoch], seen[epoch + 2])
            assert not torch.equal(seen[epoch], seen[epoch + 1])
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6


def test_the_first_crops_are_those_of_a_run_without_it(data, tokenizer_weight, tmp_path):
    target, _ = build(data, tmp_path, tokenizer_weight)
    plain = target.dataset.files
    for epoch in range(2):
        for name in ("image", "tokenizer_image"):
            assert torch.equal(target.dataset[epoch, 3][name], plain[epoch, 3][name])


def test_after_k_epochs_neither_view_nor_tokenizer(data, tokenizer_weight, tmp_path, monkeypatch):
    """Also not for the image that an epoch leaves out; the last of 0 is after the run."""
    counts = Counts(monkeypatch)
    pretrain(data, tmp_path, tokenizer_weight, "--epochs", "6")
    assert counts.encoded == [16, 16, 0, 0, 0, 0, 0]
    assert counts.views == [16, 16, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("more", [[], ["--data_pipeline", "fast", "--augment_on_device"]])
@pytest.mark.parametrize("second", ["bicubic", "bilinear"])  # the former: one view for both
def test_what_a_step_gets_does_not_depend_on_what_is_stored(second, more, data, tokenizer_weight, tmp_path):
    target, _ = build(data, tmp_path, tokenizer_weight, *more, "--second_interpolation", second)
    keys = [(2, index) for index in (7, 1, 12, 4)]

    def read():
        batch = target.dataset.device_transform(collate(target.dataset.__getitems__(keys)))
        return batch, target.encode(batch), target.encode(batch, masked_only=True)

    batch, codes, masked = read()
    assert "tokenizer_image" in batch
    assert torch.equal(codes, Tokens.encode(target, batch))
    assert torch.equal(masked, codes[batch["mask"].flatten()])
    target.flush()
    cached, cached_codes, cached_masked = read()
    assert "tokenizer_image" not in cached and not target.pending
    assert torch.equal(cached["image"], batch["image"]) and torch.equal(cached["mask"], batch["mask"])
    assert torch.equal(cached_codes, codes) and torch.equal(cached_masked, masked)
    rows = np.load(target.cache.path(0))
    assert rows["codes"][[7, 1, 12, 4]].flatten().tolist() == codes.tolist()


def test_a_batch_that_misses_a_row_is_encoded_whole(data, tokenizer_weight, tmp_path, monkeypatch):
    target, _ = build(data, tmp_path, tokenizer_weight)
    target.cache.write(Row(0, 4, 4), np.array([1, 2, 3, 4]))
    counts = Counts(monkeypatch)
    batch = target.dataset.device_transform(collate(target.dataset.__getitems__([(0, 3), (0, 4), (0, 5)])))
    codes, computed = target.encode(batch).view(3, 4), Tokens.encode(target, batch).view(3, 4)
    assert counts.encoded == [6]
    assert codes[1].tolist() == [1, 2, 3, 4] != computed[1].tolist()
    assert torch.equal(codes[[0, 2]], computed[[0, 2]])
    target.flush()
    assert np.load(target.cache.path(0))["codes"][3:6].tolist() == codes.tolist()


@pytest.mark.parametrize("predict", [["--predict", "all"], ["--no_mask", "--num_mask_patches", "0"]])
def test_ablations_have_the_same_targets(predict, data, tokenizer_weight, tmp_path, monkeypatch):
    counts = Counts(monkeypatch)
    pretrain(data, tmp_path, tokenizer_weight, *PLAIN, *predict, cycle=1)
    assert counts.encoded == [16, 0, 0, 0, 0]
    assert log_lines(tmp_path)[2]["train_all_acc"] >= 0


def test_dall_es_codes_are_kept(data, tmp_path):
    torch.manual_seed(2)
    dvae = modeling_dvae.DallEEncoder(n_hid=8, n_blk_per_group=1, vocab_size=16)
    torch.save(dvae.state_dict(), tmp_path / "encoder.pth")
    of_dall_e = as_flags(target="tokens", tokenizer_model="dall-e", tokenizer_weight=tmp_path / "encoder.pth")
    words = [*pixel_flags(data, tmp_path / "run", *PLAIN), *of_dall_e, *as_flags(codebook_size=16)]
    args = run_beitv2_pretraining.parse_flags([*words, "--crop_cycle", "1"])
    target = run_beitv2_pretraining.build(args).stage.target
    keys = [(3, 0), (3, 9)]
    batch = target.dataset.device_transform(collate(target.dataset.__getitems__(keys)))
    codes = target.encode(batch)
    assert torch.equal(codes, target.tokenizer.get_codebook_indices(batch["tokenizer_image"]).flatten())
    target.flush()
    assert torch.equal(target.encode(collate(target.dataset.__getitems__(keys))), codes)


def test_pictures_and_held_out_images_are_as_ever(data, tokenizer_weight, tmp_path):
    more = as_flags(eval_data_path=data, image_freq=1, epochs=1, lr=0)
    pretrain(data, tmp_path / "with", tokenizer_weight, *more)
    pretrain(data, tmp_path / "without", tokenizer_weight, *more, cycle=0)
    one, other = log_lines(tmp_path / "with")[0], log_lines(tmp_path / "without")[0]
    tested = [name for name in one if name.startswith("test_")]
    assert "test_loss" in tested and {n: one[n] for n in tested} == {n: other[n] for n in tested}
    picture = "pictures/masked_tokens-0000.png"
    assert (tmp_path / "with" / picture).read_bytes() == (tmp_path / "without" / picture).read_bytes()
    assert not (tmp_path / "without/codes").exists()


# ── the same run, whatever happens to it ──


def test_two_runs_are_equal(undisturbed, data, tokenizer_weight, tmp_path):
    pretrain(data, tmp_path, tokenizer_weight)
    assert_same_runs(tmp_path, undisturbed)
    assert (stored(tmp_path) == stored(undisturbed)).all()
    assert (stored(tmp_path)["checksum"] > 0).all()


# steps are 3 an epoch; codes of epochs 0 and 1 are stored
@pytest.mark.parametrize(
    ("steps", "workers"),
    [(3, "0"), (7, "1"), *(pytest.param(n, "01"[n % 2], marks=pytest.mark.slow) for n in (2, 4, 5, 10))],
)
def test_a_killed_run_ends_as_an_undisturbed_one(
    steps, workers, undisturbed, data, tokenizer_weight, tmp_path, monkeypatch
):
    more = ["--num_workers", workers, "--save_ckpt_steps", "2"]
    with monkeypatch.context() as patched:
        kill_after(steps, patched)
        # each batch is written at once: more than the checkpoint knows of
        patched.setattr(engine_for_crop_cycle, "BATCHES_KEPT", 1)
        with pytest.raises(KeyboardInterrupt):
            pretrain(data, tmp_path, tokenizer_weight, *more)
    pretrain(data, tmp_path, tokenizer_weight, *more)
    assert_same_runs(tmp_path, undisturbed)
    assert (stored(tmp_path) == stored(undisturbed)).all()


@pytest.mark.parametrize("lost", ["a torn row", "rows that never reached the disk", "a whole file"])
def test_what_was_lost_is_computed_again(lost, undisturbed, data, tokenizer_weight, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_after(7, patched)
        with pytest.raises(KeyboardInterrupt):
            pretrain(data, tmp_path, tokenizer_weight)
    path = tmp_path / "codes/crop-0000.npy"
    rows = np.load(path, mmap_mode="r+")
    if lost == "a torn row":
        rows["codes"][5, 2:] ^= 3
    if lost == "rows that never reached the disk":
        rows[3:9] = 0
    rows.flush()
    if lost == "a whole file":
        path.unlink()
    pretrain(data, tmp_path, tokenizer_weight)
    assert (stored(tmp_path) == stored(undisturbed)).all()
    assert_same_runs(tmp_path, undisturbed)


def test_rows_are_on_the_disk_before_a_checkpoint(data, tokenizer_weight, tmp_path, monkeypatch):
    order = []
    flush, save = CodeCache.flush, run_beitv2_pretraining.checkpoints.Saver.submit
    monkeypatch.setattr(CodeCache, "flush", lambda cache: (order.append("codes"), flush(cache)))
    monkeypatch.setattr(
        run_beitv2_pretraining.checkpoints.Saver,
        "submit",
        lambda *args: (order.append(int((stored(tmp_path)["checksum"] > 0).sum())), save(*args)),
    )
    pretrain(data, tmp_path, tokenizer_weight, "--save_ckpt_steps", "1", "--epochs", "1")
    assert order == ["codes", 5, "codes", 10, "codes", 15, "codes", "codes", 16]


@pytest.mark.slow
def test_two_processes_share_the_cache(data, tokenizer_weight, tmp_path):
    """Batches of 4 = 2 x 2; the first pair of epochs by two processes, the last by one,
    which finds all rows.
    """
    out = tmp_path / "run"
    line = flags(data, out, tokenizer_weight, "--batch_size", "2", "--num_workers", "1")
    two_processes("run_beitv2_pretraining.py", [*line, "--epochs", "3"])
    rows = stored(out)
    assert (rows["checksum"] > 0).all()
    again = flags(data, tmp_path / "again", tokenizer_weight, "--batch_size", "2", "--num_workers", "1")
    two_processes("run_beitv2_pretraining.py", [*again, "--epochs", "3"])
    assert_same_runs(out, tmp_path / "again")
    said = one_process("run_beitv2_pretraining.py", [*line, "--batch_size", "4", "--epochs", "4"])
    assert "comes from 2 processes" in said
    assert (stored(out) == rows).all()
    assert len(log_lines(out)) == 4


def test_another_batch_size_goes_on_with_the_same_codes(data, tokenizer_weight, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            pretrain(data, tmp_path, tokenizer_weight, "--save_ckpt_steps", "1")
    before = stored(tmp_path)
    assert (before["checksum"] > 0).sum() == 10
    pretrain(data, tmp_path, tokenizer_weight, "--batch_size", "3")
    after = stored(tmp_path)
    there = before["checksum"] > 0
    assert (after[there] == before[there]).all() and (after["checksum"] > 0).all()


def test_more_crops_take_up_those_that_are_there(undisturbed, data, tokenizer_weight, tmp_path, monkeypatch):
    shutil.copytree(undisturbed / "codes", tmp_path / "codes")
    counts = Counts(monkeypatch)
    pretrain(data, tmp_path, tokenizer_weight, cycle=3)
    assert counts.encoded == [0, 0, 16, 0, 0]
    assert (stored(tmp_path)[:2] == stored(undisturbed)).all()


# ── images that do not decode ──


def test_a_row_is_of_the_file_that_is_shown(tokenizer_weight, tmp_path, monkeypatch):
    folder, out = photos(tmp_path / "photos"), tmp_path / "run"
    broken = folder / "a/3.jpg"
    content = broken.read_bytes()
    broken.write_bytes(b"no image")
    target, _ = build(folder, out, tokenizer_weight)

    def read(epoch):
        batch = collate(target.dataset.__getitems__([(epoch, 2), (epoch, 3)]))
        codes = target.encode(target.dataset.device_transform(dict(batch)))
        target.flush()
        return batch, codes.view(2, 4)

    batch, replaced = read(0)
    assert len(batch["failed"]) == 1 and "3.jpg" in batch["failed"][0]
    batch, again = read(2)
    assert "rows" not in batch and len(batch["failed"]) == 1
    assert torch.equal(again, replaced)
    broken.write_bytes(content)
    batch, own = read(4)
    assert [row and row.shown for row in batch["rows"]] == [None, 3]
    assert torch.equal(own[0], replaced[0])
    shown = target.dataset.device_transform(batch)
    assert torch.equal(own, Tokens.encode(target, shown).view(2, 4))
    assert not torch.equal(shown["image"][1], collate(target.dataset.__getitems__([(4, 4)]))["image"][0])
    broken.write_bytes(b"no image")
    batch, codes = read(6)
    assert [row and row.shown for row in batch["rows"]] == [None, 4]
    assert torch.equal(codes, replaced)


# ── the files ──


@pytest.fixture
def cache(tmp_path):
    made = CodeCache(tmp_path / "codes", 2, 6, 3, 16)
    made.prepare(ABOUT)
    return made


@pytest.mark.parametrize(("codes", "size"), [(16, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_rows_are_as_wide_as_codes_need(codes, size, tmp_path):
    cache = CodeCache(tmp_path, 1, 6, 3, codes)
    cache.prepare(ABOUT)
    row = Row(0, 5, 5)
    largest = np.array([0, 0, codes - 1])
    assert cache.read(row) is None
    cache.write(row, largest)
    assert cache.read(row).tolist() == largest.tolist()
    assert cache.path(0).stat().st_size == cache.file_size == len(cache.header) + 6 * (3 * size + 4)


def test_rows_count_only_whole(cache):
    row = Row(1, 4, 4)
    cache.write(row, np.array([1, 2, 3]))
    assert cache.read(row).tolist() == [1, 2, 3]
    assert cache.read(row._replace(shown=5)) is None
    assert all(cache.read(Row(number, image, image)) is None for number, image in ((0, 4), (1, 3), (1, 5)))
    assert cache.lacks(1, [4, 5]) and not cache.lacks(1, [4])
    size = cache.row.itemsize
    start = len(cache.header) + 4 * size
    whole = cache.path(1).read_bytes()
    for cut in range(size):  # the rest of the row, or its beginning, is not there yet
        for torn in (bytes(size - cut), whole[start : start + size - cut]):
            at = start + cut if not any(torn) else start
            with open(cache.path(1), "r+b") as file:
                file.seek(start)
                file.write(whole[start : start + size])
                file.seek(at)
                file.write(bytes(size - cut) if not any(torn) else torn + bytes(cut))
            found = cache.read(row)
            assert found is None or found.tolist() == [1, 2, 3]
    assert (cache.read(row) is None) == (cut > 0)


def test_a_copy_in_another_process_reads_what_is_written(cache):
    import pickle

    row = Row(0, 2, 2)
    assert cache.read(row) is None
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.mapped == {} and cache.mapped
    assert copy.read(row) is None
    cache.write(row, np.array([7, 7, 7]))
    assert copy.read(row).tolist() == [7, 7, 7]


# ── refusals ──


def test_other_codes_are_refused_by_name(undisturbed, data, tokenizer_weight, tmp_path, capsys):
    shutil.copytree(undisturbed / "codes", tmp_path / "codes")
    before = stored(tmp_path)
    torch.save(
        {"model": {k: v * 1.01 for k, v in checkpoint(tokenizer_weight)["model"].items()}}, tmp_path / "t"
    )
    for more, names in (
        (["--min_crop_scale", "0.5"], "min_crop_scale 0.08, here 0.5"),
        (["--seed", "1"], "seed 0, here 1"),
        (["--vflip", "0.5"], "vflip 0.0, here 0.5"),
        (["--amp_dtype", "bf16"], "precision fp32, here bf16"),
        (["--tokenizer_weight", str(tmp_path / "t")], "tokenizer "),
        (["--data_path", str(data / "a")], "images 16, here 8"),
    ):
        error = refused(run_beitv2_pretraining.main, flags(data, tmp_path, tokenizer_weight, *more), capsys)
        assert names in error and str(tmp_path / "codes") in error and "remove" in error
    assert (stored(tmp_path) == before).all()


def test_what_the_student_alone_sees_changes_no_codes(undisturbed, data, tokenizer_weight, tmp_path):
    shutil.copytree(undisturbed / "codes", tmp_path / "codes")
    more = as_flags(lr=1, num_mask_patches=1, train_interpolation="lanczos", drop_path=0.2)
    build(data, tmp_path, tokenizer_weight, *more)


@pytest.mark.parametrize("name", ["about.json", "crop-0001.npy"])
def test_damaged_files_are_named(name, undisturbed, data, tokenizer_weight, tmp_path, capsys):
    shutil.copytree(undisturbed / "codes", tmp_path / "codes")
    path = tmp_path / "codes" / name
    path.write_bytes(path.read_bytes()[:-5])
    error = refused(run_beitv2_pretraining.main, flags(data, tmp_path, tokenizer_weight), capsys)
    assert str(path) in error and "damaged" in error and "remove" in error
    if name == "about.json":
        path.unlink()
        assert "without about.json" in refused(
            run_beitv2_pretraining.main, flags(data, tmp_path, tokenizer_weight), capsys
        )


def test_the_size_is_told_and_compared_with_the_disk(tmp_path, monkeypatch, caplog):
    cache = CodeCache(tmp_path / "codes", 16, 1281167, 196, 8192)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(code_cache.shutil, "disk_usage", lambda _: usage._replace(free=5 * 2**30))
    with user_reads(r"--crop_cycle 16: .* 1,281,167 images take 7\.6 GiB .* has 5\.0 GiB: take fewer"):
        cache.prepare(ABOUT)
    assert not list(cache.folder.glob("*.npy"))
    monkeypatch.setattr(code_cache.shutil, "disk_usage", lambda _: usage._replace(free=9 * 2**30))
    with caplog.at_level("INFO", logger="beit"):
        cache.prepare(ABOUT)
    assert "16 crops of each image: 7.6 GiB in" in caplog.text
    assert sum(path.stat().st_blocks * 512 for path in cache.folder.iterdir()) < 2**20


def test_an_estimate_counts_the_files(undisturbed, data, tokenizer_weight, tmp_path, capsys):
    file, disk = tmp_path / "estimate.json", {}
    for cycle in (0, 2):
        words = flags(data, "", tokenizer_weight, *as_flags(images=16, output=file), cycle=cycle)
        estimate.main(["run_beitv2_pretraining.py", *map(str, words)])
        disk[cycle] = json.loads(file.read_text())["disk_bytes"]
        assert ("of codes" in capsys.readouterr().out) == bool(cycle)
    codes = sum(path.stat().st_size for path in (undisturbed / "codes").glob("crop-*.npy"))
    assert disk[2] - disk[0] == codes > 2 * 16 * (2 * 4 + 4)  # patches, checksum; and headers


def test_what_cannot_be_kept_is_refused(data, tokenizer_weight, tmp_path, capsys):
    main = run_beitv2_pretraining.main
    assert "--output_dir" in refused(main, flags(data, "", tokenizer_weight), capsys)
    error = refused(main, flags(data, tmp_path, tokenizer_weight, "--batch_size", "64"), capsys)
    assert "--crop_cycle: the 16 images do not fill a batch" in error
    assert not (tmp_path / "codes").exists()
    (tmp_path / "codes").write_text("a file")
    assert "codes" in refused(main, flags(data, tmp_path, tokenizer_weight), capsys)


def test_without_a_tokenizer_it_does_nothing(data, tmp_path, capsys):
    run_beitv2_pretraining.main(pixel_flags(data, tmp_path, "--epochs", "1", "--crop_cycle", "2"))
    assert "--crop_cycle does nothing here: --target pixels" in capsys.readouterr().out
    assert not (tmp_path / "codes").exists()


def test_a_short_run_is_told_that_no_crop_comes_again(data, tokenizer_weight, tmp_path, capsys):
    build(data, tmp_path, tokenizer_weight, cycle=4)
    assert "no crop comes again in 4 epochs" in capsys.readouterr().out


# ── filled beforehand ──


def test_codes_can_be_made_beforehand(data, tokenizer_weight, tmp_path, monkeypatch, capsys):
    line = flags(data, tmp_path, tokenizer_weight, "--num_workers", "1")
    encode_images.main(["--for_pretraining", *line])
    assert "codes      of 2 crops of 16 images are in" in capsys.readouterr().out
    assert (stored(tmp_path)["checksum"] > 0).all()
    target, _ = build(data, tmp_path, tokenizer_weight)
    for number in range(2):
        views = torch.stack([target.dataset[number, index]["tokenizer_image"] for index in range(16)])
        codes = target.tokenizer.get_codebook_indices(views.float() / 255)
        assert (codes.numpy() == stored(tmp_path)[number]["codes"]).all()
    counts = Counts(monkeypatch)
    encode_images.main(["--for_pretraining", *line])  # nothing is left to do
    pretrain(data, tmp_path, tokenizer_weight)
    assert counts.encoded == [0] * 5 and counts.views == [0] * 5


def test_filling_is_killed_and_goes_on(data, tokenizer_weight, tmp_path, monkeypatch):
    encode_images.main(["--for_pretraining", *flags(data, tmp_path / "whole", tokenizer_weight)])
    write, written = CodeCache.write, []

    def killed(cache, row, codes):
        written.append(row)
        if len(written) == 13:
            raise KeyboardInterrupt
        write(cache, row, codes)

    line = ["--for_pretraining", *flags(data, tmp_path / "killed", tokenizer_weight)]
    with monkeypatch.context() as patched:
        patched.setattr(CodeCache, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            encode_images.main(line)
    encode_images.main(line)
    assert (stored(tmp_path / "killed") == stored(tmp_path / "whole")).all()


@pytest.mark.slow
def test_two_processes_fill_as_one(data, tokenizer_weight, tmp_path):
    for run, name in ((one_process, "one"), (two_processes, "two")):
        run("encode_images.py", ["--for_pretraining", *flags(data, tmp_path / name, tokenizer_weight)])
    assert (stored(tmp_path / "one") == stored(tmp_path / "two")).all()


def test_filling_needs_to_know_how_many_crops(data, tokenizer_weight, tmp_path, capsys):
    line = ["--for_pretraining", *flags(data, tmp_path, tokenizer_weight, cycle=0)]
    assert "--crop_cycle" in refused(encode_images.main, line, capsys)


def test_a_runs_flags_file_can_fill(undisturbed, tmp_path):
    config = json.loads((undisturbed / "flags.json").read_text())
    assert config["crop_cycle"] == 2
    encode_images.main(
        ["--for_pretraining", *as_flags(config=undisturbed / "flags.json", output_dir=tmp_path)]
    )
    assert (stored(tmp_path)["codes"] == stored(undisturbed)["codes"]).all()


def test_a_data_set_without_a_cycle_is_not_wrapped(data, tokenizer_weight, tmp_path):
    target, loaded = build(data, tmp_path, tokenizer_weight, cycle=0)
    assert type(target) is Tokens and not isinstance(loaded.loader.dataset, CropCycle)
