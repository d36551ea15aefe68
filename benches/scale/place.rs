//! Where a broker of a row keeps its things, and how it is configured: by a file, so that the program itself can be
//! started on what was filled here.

use std::path::{Path, PathBuf};

use claviger::clock::SystemClock;
use claviger::config::Resolved;
use claviger::config::assembly::Running;
use claviger::policy::SHIPPED;
use claviger::secret::SecretId;

/// Where the secrets are.
pub(crate) const ENVIRONMENT: &str = "production";
/// How long a value is, in bytes.
pub(crate) const VALUE: usize = 200;
/// The group that reads.
pub(crate) const READERS: &str = "operators";

/// A folder with a broker's configuration, policies and data.
pub(crate) struct Place {
    folder: PathBuf,
}

impl Place {
    /// The place in this folder, as it is.
    pub(crate) fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Writes the configuration, with the shipped policies.
    pub(crate) fn configure(&self) {
        let shipped = SHIPPED.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        self.set_policies(shipped);
        std::fs::write(self.config(), self.text()).unwrap();
    }

    /// Puts these policies, pairs of name and text, in the place of those that are there.
    pub(crate) fn set_policies(&self, texts: impl IntoIterator<Item = (String, String)>) {
        let folder = self.folder.join("policies");
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        for (name, text) in texts {
            std::fs::write(folder.join(name), text).unwrap();
        }
    }

    /// The configuration's file.
    pub(crate) fn config(&self) -> PathBuf {
        self.folder.join("claviger.toml")
    }

    /// The Unix socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("claviger.sock")
    }

    /// The embedded store's file.
    pub(crate) fn database(&self) -> PathBuf {
        self.folder.join("data/claviger.db")
    }

    pub(crate) fn root_key(&self) -> PathBuf {
        self.folder.join("data/keys/root.key")
    }

    /// A broker on it, in this process.
    pub(crate) async fn start(&self) -> Running {
        let text = std::fs::read_to_string(self.config()).unwrap();
        let resolved = Resolved::from_text(&text, "claviger.toml").unwrap_or_else(|error| panic!("{error}"));
        let running = Running::start(&resolved, &|_| None, SystemClock::shared()).await;
        running.unwrap_or_else(|error| panic!("{error}"))
    }

    /// A cache that a million secrets fit in, and that keeps them for as long as anyone measures. The default one holds
    /// 64 MiB of them.
    fn text(&self) -> String {
        let (folder, uid) = (self.folder.display(), rustix::process::getuid().as_raw());
        let environments = crate::teams::ENVIRONMENTS
            .map(|name| format!("[environments.{name}]\naudit = \"relaxed\"\nttl = \"24h\"\n"));
        format!(
            "[listen]\nunix = \"{folder}/claviger.sock\"\n\
             [kv]\ndirectory = \"{folder}/data\"\n\
             [root_key]\nfile = \"{folder}/data/keys/root.key\"\n\
             [policy]\ndirectory = \"{folder}/policies\"\n\
             [cache]\ncapacity_mib = 8192\n\
             [[identity.peer_credentials.callers]]\nuid = {uid}\nkind = \"user\"\nid = \"benchmark\"\n\
             groups = [\"{READERS}\"]\n{}",
            environments.concat()
        )
    }
}

/// One of the secrets, by its number; their names are in the order of the numbers.
pub(crate) fn id(number: usize) -> SecretId {
    SecretId::parse(ENVIRONMENT, &format!("payments/service-{number:07}/database")).unwrap()
}
