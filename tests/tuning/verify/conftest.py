"""The environment of the sandbox tests, and checks that nothing is left behind."""

import pathlib
import shutil
import tempfile

import pytest
from escapes import HANG, LONG, processes, sandbox, wait_until


@pytest.fixture(scope="module", autouse=True, params=[True, False], ids=["namespaces", "limits alone"])
def namespaces(request):
    """Both must work: the kernel may refuse the namespaces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "_TRY_NAMESPACES", request.param)
        yield


@pytest.fixture(autouse=True)
def no_process_left():
    yield
    assert wait_until(lambda: not processes(HANG, LONG), 1.0), "a process outlived the test"


@pytest.fixture(scope="module")
def playground():
    """A directory with all permissions for every uid. It must contain exactly one file and one directory."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="sandbox-test-", dir="/tmp"))
    (path / "kept").write_text("kept")
    (path / "kept-directory").mkdir()
    for each in (path, *path.iterdir()):
        each.chmod(0o777)
    yield path
    shutil.rmtree(path)
