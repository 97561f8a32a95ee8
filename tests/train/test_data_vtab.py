import pytest

from vpdeploy.errors import SpecError
from vpdeploy_train.data import resolve_data

LISTS = {"train800.txt": range(4), "val200.txt": range(4, 6), "test.txt": range(6, 9)}


@pytest.fixture
def task(tmp_path):
    """A task of two classes, 0 and 1; image N is of class N modulo 2."""
    folder = tmp_path / "root" / "cifar"
    (folder / "images" / "sub").mkdir(parents=True)
    for name, numbers in {**LISTS, "train800val200.txt": range(6)}.items():
        (folder / name).write_text("".join(f"images/sub/{number}.jpg {number % 2}\n" for number in numbers))
    for number in range(9):
        (folder / "images" / "sub" / f"{number}.jpg").touch()
    return folder


def resolve(task, suffix="", **options):
    return resolve_data(f"vtab:{task}{suffix}", seed=0, **options)


def rows(examples):
    return [(example.source.name, example.label) for example in examples]


def expected(numbers):
    return [(f"{number}.jpg", number % 2) for number in numbers]


def append(task, line, name="val200.txt"):
    with (task / name).open("a") as stream:
        stream.write(f"{line}\n")


def test_each_list_is_a_split(task):
    source = resolve(task)
    assert rows(source.train) == expected(range(4))
    assert rows(source.val) == expected(range(4, 6))
    assert rows(source.test) == expected(range(6, 9))
    assert (source.labels, source.augmentation) == (("0", "1"), "none")
    assert source.train[0].source == task / "images" / "sub" / "0.jpg"


def test_the_final_training_has_train_and_val(task):
    source = resolve(task, "#final")
    assert rows(source.train) == expected(range(6))
    assert source.val == ()
    assert rows(source.test) == expected(range(6, 9))


def test_one_list_of_all_training_images_is_divided(task):
    for name in ("train800.txt", "val200.txt"):
        (task / name).unlink()
    source = resolve(task, val_fraction=0.34)
    assert (len(source.train), len(source.val), len(source.test)) == (4, 2, 3)
    assert rows(resolve(task, "#final").train) == expected(range(6))


def test_class_names_come_from_a_file(task):
    (task / "classes.txt").write_text("a cat\ndog\nemu\n")
    source = resolve(task)
    assert source.labels == ("a cat", "dog", "emu")
    assert rows(source.train) == expected(range(4))


def test_a_class_may_occur_in_the_test_list_alone(task):
    (task / "images" / "9.jpg").touch()
    append(task, "images/9.jpg 11", "test.txt")
    source = resolve(task)
    assert source.labels == tuple(str(label) for label in range(12))
    assert rows(source.test)[-1] == ("9.jpg", 11)
    assert rows(source.train) == expected(range(4))


def test_paths_may_hold_spaces_and_lines_end_in_any_way(task):
    (task / "images" / "a b.jpg").touch()
    append(task, "images/a b.jpg\t1\r\n\r\n")
    assert rows(resolve(task).val)[-1] == ("a b.jpg", 1)


@pytest.mark.parametrize("name", LISTS)
def test_a_missing_list_is_named(task, name):
    (task / name).unlink()
    with pytest.raises(SpecError, match=rf"cifar/{name}: file not found; expected a VTAB-1k task: train800\.txt"):
        resolve(task)


def test_a_folder_of_tasks_says_which_there_are(task):
    with pytest.raises(SpecError, match=r"name one task's folder, such as vtab:.*root/cifar; there are cifar$"):
        resolve(task.parent)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"none/train800\.txt: file not found"):
        resolve(tmp_path / "none")


@pytest.mark.parametrize("line", ["images/sub/0.jpg", "images/sub/0.jpg cat", "images/sub/0.jpg -1", "7", "x 1.5"])
def test_a_line_of_another_form_is_refused_by_file_and_line(task, line):
    append(task, line)
    with pytest.raises(SpecError, match=r"val200\.txt: line 3 is '.*'; expected an image's path and the number of its"):
        resolve(task)


def test_a_class_beyond_the_names_is_refused_by_file_and_line(task):
    (task / "classes.txt").write_text("cat\ndog\n")
    append(task, "images/sub/0.jpg 2")
    with pytest.raises(SpecError, match=r"val200\.txt: line 3: class 2; expected 0 to 1, as classes\.txt names 2"):
        resolve(task)


def test_an_absurd_class_is_refused(task):
    append(task, "images/sub/0.jpg 99999999")
    with pytest.raises(SpecError, match=r"val200\.txt: line 3: class 99999999; expected 0 to 9999$"):
        resolve(task)


def test_a_missing_image_is_refused_by_file_and_line(task):
    (task / "images" / "sub" / "7.jpg").unlink()
    with pytest.raises(SpecError, match=r"test\.txt: line 2: images/sub/7\.jpg is not there \(1 of 3 images are not\)"):
        resolve(task)


def test_an_empty_list_is_refused(task):
    (task / "val200.txt").write_text("\n")
    with pytest.raises(SpecError, match=r"val200\.txt: no images"):
        resolve(task)


@pytest.mark.parametrize(("names", "message"), [("a\n\nb\n", "line 2: no name"), ("a\nb\na\n", "line 3: 'a' is repea")])
def test_class_names_that_cannot_be_used_are_refused(task, names, message):
    (task / "classes.txt").write_text(names)
    with pytest.raises(SpecError, match=rf"classes\.txt: {message}"):
        resolve(task)


def test_a_runs_labels_are_kept(task):
    assert resolve(task, labels=("1", "0")).train[0].label == 1
