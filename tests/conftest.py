"""What holds for every test, and the fixtures that many share."""

from local_users import made_users, root, users  # noqa: F401 - fixtures
from logging_state import log_as_before  # noqa: F401 - an autouse fixture
from peers.fixtures import no_public_realms  # noqa: F401 - an autouse fixture
from peers.kerberos.fixtures import kdc, mit_kdc, samba_kdc  # noqa: F401 - fixtures
