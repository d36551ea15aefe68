//! Files of certificates and keys for the tests of this folder.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use rustls::pki_types::CertificateDer;

use super::material::{Material, Pair};
use super::trust::Trust;
use super::{Clients, Settings, TlsError};
use crate::clock::{ManualClock, SharedClock};

/// The first second of a year.
pub(super) fn year(year: i32) -> Timestamp {
    format!("{year}-01-01T00:00:00Z").parse().unwrap()
}

/// The files of one listener.
pub(super) struct Folder {
    folder: tempfile::TempDir,
    pub(super) settings: Settings,
}

impl Folder {
    /// A valid pair, from 2025 to 2027, and an authority until 2028.
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let settings = Settings {
            address: "127.0.0.1:0".parse().unwrap(),
            certificate: path("tls.crt"),
            key: path("tls.key"),
            client_ca: Some(path("ca.crt")),
            clients: Clients::Required,
        };
        let this = Self { folder, settings };
        this.pair(2025, 2027);
        this.write("ca.crt", 0o644, &Issuer::until(2028).pem());
        this
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn write(&self, name: &str, mode: u32, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
        std::fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
    }

    pub(super) fn pair(&self, from: i32, until: i32) {
        let (certificate, key) = pair(from, until);
        self.write("tls.crt", 0o644, &certificate);
        self.write("tls.key", 0o600, &key);
    }

    /// All of it, in 2026.
    pub(super) fn load(&self) -> Result<Material, TlsError> {
        let clock: SharedClock = ManualClock::new(year(2026));
        let pair = Pair::check(&self.settings, &Pair::read(&self.settings)?, clock.now())?;
        let path = self.path("ca.crt");
        let trust = Trust::check(&path, self.settings.clients, &Trust::read(&path)?, clock.now())?;
        Material::new(Arc::new(pair), Some(Arc::new(trust)), &self.settings, &clock)
    }

    pub(super) fn refused(&self) -> String {
        self.load().map(|_| ()).unwrap_err().to_string()
    }
}

fn params(from: i32, until: i32) -> CertificateParams {
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.not_before = date_time_ymd(from, 1, 1);
    params.not_after = date_time_ymd(until, 1, 1);
    params
}

/// A certificate for a server and its key, from one year's first second to another's.
pub(super) fn pair(from: i32, until: i32) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    (params(from, until).self_signed(&key).unwrap().pem(), key.serialize_pem())
}

/// An authority.
pub(super) struct Issuer(CertifiedIssuer<'static, KeyPair>);

impl Issuer {
    /// One whose last second is the first of this year.
    pub(super) fn until(until: i32) -> Self {
        let mut params = params(2020, until);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(super) fn pem(&self) -> String {
        self.0.pem()
    }

    /// What a client of it presents, from 2020 to 2040.
    pub(super) fn client(&self) -> Vec<CertificateDer<'static>> {
        let key = KeyPair::generate().unwrap();
        vec![params(2020, 2040).signed_by(&key, &*self.0).unwrap().der().clone()]
    }
}
