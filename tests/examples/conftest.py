from tests.magics.conftest import bare as bare
