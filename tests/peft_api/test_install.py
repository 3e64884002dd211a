"""``import peft`` answered by nbpeft: by a call, ``python -m nbpeft.as_peft`` and ``%load_ext nbpeft.as_peft``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peft_api.processes import python, run

# Code without torch is quick. What stands at the start of every process below.
ABSENT = "import sys; sys.modules['peft'] = None\n"  # as if PEFT were not installed


def test_it_is_off_until_it_is_installed_and_leaves_no_trace() -> None:
    run("""
        import sys, importlib.metadata, importlib.util
        import nbpeft
        def state():
            others = sorted(name for name in sys.modules if not name.startswith("nbpeft."))
            return list(sys.meta_path), others, importlib.util.find_spec("peft").origin
        importlib.metadata.metadata("peft")  # which imports modules of its own
        from nbpeft import install_as_peft, uninstall_as_peft
        before = state()
        with install_as_peft():
            install_as_peft()
            import peft, peft.utils.hotswap
            assert peft.__version__ == importlib.metadata.version("peft") == "0.21.2"
            assert importlib.util.find_spec("peft") and importlib.util.find_spec("peft.tuners.lora")
            assert importlib.util.find_spec("peft.nothing") is None
            assert importlib.metadata.metadata("peft")["Name"] == "peft"
            assert "torch" not in sys.modules
        assert state() == before
        uninstall_as_peft()
        assert state() == before
    """)


@pytest.mark.parametrize("others", ["", "hide()"], ids=["installed", "not-installed"])
def test_its_metadata_is_there_once(others: str) -> None:
    run(f"""
        import importlib.metadata as metadata
        import nbpeft
        def hide():
            found = metadata.MetadataPathFinder.find_distributions
            metadata.MetadataPathFinder.find_distributions = classmethod(
                lambda cls, context: (one for one in found(context) if one.metadata["Name"] != "peft")
            )
        {others}
        with nbpeft.install_as_peft():
            assert [one.version for one in metadata.distributions() if one.name == "peft"] == ["0.21.2"]
            assert metadata.packages_distributions()["peft"] == ["peft"]
            assert metadata.metadata("peft")["Summary"] == "nbpeft under the name peft"
            assert metadata.requires("peft") == metadata.requires("nbpeft") and metadata.requires("peft")
    """)


def test_an_inner_block_does_not_end_an_outer_one() -> None:
    run("""
        import sys, nbpeft
        with nbpeft.install_as_peft():
            with nbpeft.install_as_peft():
                pass
            import peft
            assert peft.__spec__.loader.__class__.__module__ == "nbpeft.peft_api.install"
    """)


def test_peft_itself_is_not_mixed_with_it(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text("__version__ = '0.21.2'")
    run(
        """
        import sys, nbpeft
        sys.path.insert(0, "")
        import peft
        before = list(sys.meta_path)
        try:
            nbpeft.install_as_peft()
        except nbpeft.NbpeftError as error:
            assert "peft is already imported from" in str(error) and "\\n" not in str(error)
            assert error.details == {"version": "0.21.2"}
        else:
            raise AssertionError("it was mixed")
        assert sys.meta_path == before and sys.modules["peft"] is peft
        """,
        tmp_path,
    )


def test_a_peft_that_must_not_be_imported_still_must_not_afterwards() -> None:
    run(f"""
        {ABSENT}
        import nbpeft
        with nbpeft.install_as_peft():
            import peft
        assert sys.modules["peft"] is None
    """)


def test_a_script_runs_with_its_arguments(tmp_path: Path) -> None:
    script = "import sys, peft, beside\nprint(__name__, sys.argv[1:], peft.__spec__.loader.root, beside.__name__)"
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "script.py").write_text(script)
    (tmp_path / "package" / "beside.py").write_text("")
    (tmp_path / "beside.py").write_text("")
    printed = "__main__ ['--rank', '4'] peft beside"
    for command in (["package/script.py"], ["-m", "package.script"]):
        assert python("-m", "nbpeft.as_peft", *command, "--rank", "4", folder=tmp_path) == printed


def test_a_script_must_be_named() -> None:
    from nbpeft.as_peft import main

    for arguments in ([], ["-m"], ["--help"]):
        with pytest.raises(SystemExit, match="usage: python -m"):
            main(arguments)


def test_an_extension_installs_it_in_a_notebook() -> None:
    run("""
        import sys
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        shell.run_line_magic("load_ext", "nbpeft.as_peft")
        assert "lora" in shell.magics_manager.magics["cell"]
        shell.run_cell("import peft").raise_error()
        assert shell.user_ns["peft"].__spec__.loader.root == "peft" and "torch" not in sys.modules
        shell.run_line_magic("unload_ext", "nbpeft.as_peft")
        assert "lora" not in shell.magics_manager.magics["cell"] and "peft" not in sys.modules
    """)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", ABSENT], ids=["installed", "not-installed"])
def test_classes_are_nbpefts_wherever_they_are_imported_from(first: str) -> None:
    run(f"""
        {first}
        import nbpeft
        nbpeft.install_as_peft()
        import peft, peft.tuners.lora.layer, peft.tuners.tuners_utils
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer
        assert peft.LoraConfig is peft.tuners.lora.config.LoraConfig is nbpeft.LoraConfig
        assert LoraLayer is peft.tuners.lora.layer.LoraLayer is nbpeft.LoraLayer
        import torch
        base = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Embedding(3, 2))
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "1"]))
        linear, embedding = model.base_model.model
        assert all(isinstance(layer, (LoraLayer, BaseTunerLayer)) for layer in (linear, embedding))
        assert isinstance(linear, peft.tuners.lora.Linear) and not isinstance(embedding, peft.tuners.lora.Linear)
        assert isinstance(embedding, peft.tuners.lora.layer.Embedding)
        assert not isinstance(linear, (peft.tuners.ia3.Linear, peft.tuners.loha.Linear, torch.nn.Embedding))
        assert not isinstance(base, BaseTunerLayer) and isinstance(model, peft.PeftModel)
        space = {{}}
        exec("from peft import *", space)
        assert space["get_peft_model"] is nbpeft.get_peft_model and "LoHaConfig" in space
    """)


LIBRARIES = """
    import importlib.metadata
    import accelerate.utils, transformers.utils, transformers.trainer, transformers.trainer_utils
    from transformers.utils.peft_utils import check_peft_version
    import torch
    {install}
    from peft import LoraConfig, get_peft_model
    import nbpeft
    from transformers.integrations.peft import MIN_PEFT_VERSION
    assert transformers.utils.is_peft_available() and accelerate.utils.is_peft_available()
    check_peft_version(MIN_PEFT_VERSION)
    import peft.config
    assert peft.config.__version__ == peft.__version__
    base = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert not accelerate.utils.is_peft_model(base) and not transformers.trainer_utils._is_peft_model(base)
    model = get_peft_model(base, LoraConfig(target_modules=["0"]))
    assert accelerate.utils.is_peft_model(model) and transformers.trainer_utils._is_peft_model(model)
    assert transformers.trainer.PeftModel is nbpeft.PeftModel
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", ABSENT], ids=["installed", "not-installed"])
def test_libraries_imported_later_know_the_models(first: str) -> None:
    run(f"{first}\nimport nbpeft; nbpeft.install_as_peft()\n" + LIBRARIES.replace("    ", "").format(install=""))


@pytest.mark.slow
def test_libraries_imported_before_know_the_models_and_forget_them() -> None:
    code = ABSENT + LIBRARIES.replace("    ", "").format(
        install="""
assert not transformers.utils.is_peft_available() and not hasattr(transformers.trainer, "PeftModel")
import nbpeft; nbpeft.install_as_peft()"""
    )
    run(
        code
        + """
nbpeft.uninstall_as_peft()
assert not transformers.utils.is_peft_available() and not accelerate.utils.is_peft_available()
assert not hasattr(transformers.trainer, "PeftModel") and not hasattr(transformers.trainer_utils, "PeftMixedModel")
"""
    )


def test_its_modules_are_listed_and_imported_as_those_of_peft() -> None:
    run("""
        import importlib, importlib.util, inspect, os, pkgutil, sys
        import nbpeft
        from pathlib import Path
        folder = Path(importlib.util.find_spec("peft").origin).parent
        theirs = {one.stem for one in folder.iterdir() if one.suffix == ".py" or (one / "__init__.py").exists()}
        with nbpeft.install_as_peft():
            import peft
            assert {one.name for one in pkgutil.iter_modules(peft.__path__)} == theirs - {"__init__"}
            packages = {one.name for one in pkgutil.iter_modules(peft.tuners.__path__, "peft.tuners.") if one.ispkg}
            assert {"peft.tuners.lora", "peft.tuners.trainable_tokens"} <= packages
            walked = [one.name for one in pkgutil.walk_packages(peft.__path__, prefix="peft.")]
            assert "peft.tuners.lora.layer" in walked and len(walked) == len(set(walked))
            for name in walked:  # as code does that patches a function in all of them
                module = importlib.import_module(name)
                assert module.__spec__ is not None and hasattr(module, "nothing") is False
            assert os.path.exists(peft.__path__[0]) and importlib.util.find_spec("peft.tuners").origin
            assert importlib.util.find_spec("peft.engine") is None  # what is nbpeft's own alone
            assert "class LoraConfig" in inspect.getsource(peft.LoraConfig)
            assert inspect.getsource(peft.tuners.lora.layer)
            listed = peft.__path__
            hooks = len(sys.path_hooks)
        assert len(sys.path_hooks) == hooks - 1 and not [*pkgutil.iter_modules(listed)]
        with nbpeft.install_as_peft():
            assert [*pkgutil.iter_modules(listed)]
    """)


def test_all_its_names_are_none_of_the_callers() -> None:
    run("""
        import importlib
        import nbpeft
        theirs = set(importlib.import_module("peft").__all__)
        for name in [name for name in __import__("sys").modules if name.partition(".")[0] == "peft"]:
            del __import__("sys").modules[name]
        with nbpeft.install_as_peft():
            train = Trainer = Session = "the caller's"
            from peft import *
            import peft
            assert {train, Trainer, Session} == {"the caller's"} and LoraConfig is nbpeft.LoraConfig
            assert theirs == set(peft.__all__) and not {"train", "Trainer", "ConfigError"} & {*peft.__all__, *dir(peft)}
            assert "set_adapter" in dir(peft)
            assert peft.train is nbpeft.train
    """)


def test_its_files_are_those_of_nbpeft() -> None:
    run("""
        import importlib.resources, pkgutil
        from pathlib import Path
        import nbpeft
        with nbpeft.install_as_peft():
            import peft
            folder = importlib.resources.files("peft")
            assert folder.joinpath("py.typed").is_file() and folder == Path(nbpeft.__file__).parent
            assert folder == Path(peft.__file__).parent
            assert pkgutil.get_data("peft", "py.typed") == b""
    """)
