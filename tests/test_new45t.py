from test_train import *  # noqa
from test_train import path, start, run, refused, folder, base, out


def test_broken_or_foreign_files_of_a_run_are_told(out, refused, run):
    weights = (out / "hmar.pt").read_bytes()
    torch.save(pytree.tree_map(torch.zeros_like, torch.load(out / "hmar.pt")), out / "hmar.pt")
    assert f"{out}/args.json: tells of another hmar.pt than this" in refused(out)
    (out / "hmar.pt").write_bytes(b"")
    assert f"{out}/hmar.pt: " in refused(out)
    (out / "hmar.pt").unlink()
    (out / "hmar.pt").mkdir()
    assert f"{out}/hmar.pt: " in refused(out)
    (out / "hmar.pt").rmdir()

    tokens = np.load(out / "tokens.npy")
    tokens[0] = 255
    np.save(out / "tokens.npy", tokens)
    assert f"{out}/tokens.npy: got (30, 16, 37), up to 255, expected" in refused(out)
    os.truncate(out / "tokens.npy", 0)
    assert f"{out}/tokens.npy: " in refused(out)
    os.truncate(out / "labels.npy", 0)
    assert f"{out}/labels.npy: " in refused(out)

    record = json.loads((out / "args.json").read_text())
    for name in ("flags", "class_names", "count", "digests"):
        (out / "args.json").write_text(json.dumps(record | {name: 1.5}))
        assert f"{out}/args.json: {name}: got 1.5" in refused(out)
    (out / "args.json").write_text("[" * 100_000)
    assert f"{out}/args.json: expected a JSON object" in refused(out)
    assert weights


def test_a_checkpoint_of_other_flags_is_refused(out, refused, run):
    (out / "hmar.pt").unlink()
    with mock.patch.object(train, "save_stage", side_effect=KeyboardInterrupt):
        run(out, status=130)
    saved = torch.load(out / "checkpoint.pt")
    torch.save(saved | dict(flags=saved["flags"] | dict(seed=1)), out / "checkpoint.pt")
    assert f"{out}/checkpoint.pt: not of this run; once it is removed, masked" in refused(out)


def test_init_from_codes_of_another_meaning_is_refused(base, out, tmp_path, refused):
    torch.save(CODEC, tmp_path / "other.pt")
    flags = ("--init", out / "next-scale.pt", "--tokenizer", tmp_path / "other.pt")
    assert f"{out}/args.json: tells of another tokenizer.pt" in refused(tmp_path / "new", *flags)


def test_what_is_passed_over_or_changed_is_told(out, run, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # alone, it is the first
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "\x1b[31m").mkdir()
    (data / "disc" / "a.tiff").write_text("")
    run(out, "--data", data)
    said = capsys.readouterr().out
    assert "--data: 1 files of .tiff passed over\n" in said and "\x1b" not in said
    assert "--data: ?[31m: no image for this class\n" in said and "were changed" not in said
    os.utime(data / "disc" / "000.png")
    run(out, "--data", data)
    assert "--data: files were changed; what was prepared before is used" in capsys.readouterr().out
