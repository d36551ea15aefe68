//! One of the two parts that a listener's files are of: its own pair, and the authorities for clients.
//!
//! INVARIANT: each is judged by itself, and what is wrong with one has no say over the other: distrust of an authority
//! must not wait until a certificate is renewed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::TlsError;
use super::files::{Digest, Files};

/// What came of reading one part again and again.
pub(super) struct Part {
    name: &'static str,
    taken: AtomicU64,
    kept_out: AtomicU64,
    refused: Mutex<Option<Refusal>>,
}

/// What was refused last, and why. Without a digest, it could not even be read.
#[derive(PartialEq, Eq)]
struct Refusal {
    digest: Option<Digest>,
    error: TlsError,
}

/// Why files are read again.
#[derive(Clone, Copy)]
pub(super) struct Look<'a> {
    /// As the log says it.
    pub(super) cause: &'a str,
    /// Somebody asks: they are to hear of what is wrong, said before or not, and with what is in force already.
    pub(super) asked: bool,
}

impl Part {
    pub(super) const fn new(name: &'static str) -> Self {
        let (taken, kept_out) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { name, taken, kept_out, refused: Mutex::new(None) }
    }

    /// Judges the files, which may be those in force: then there is nothing to take. The same refusal is counted and
    /// logged once; it is still judged anew, because what is not valid yet will be.
    pub(super) fn judge<const N: usize, T>(
        &self,
        look: Look<'_>,
        files: Result<Files<N>, TlsError>,
        in_force: &Digest,
        check: impl FnOnce(&Files<N>) -> Result<T, TlsError>,
    ) -> Result<Option<T>, TlsError> {
        let digest = files.as_ref().ok().map(Files::digest);
        let judged = match files {
            Ok(_) if !look.asked && digest.as_ref() == Some(in_force) => Ok(None),
            files => files.and_then(|files| check(&files)).map(Some),
        };
        let refusal = judged.as_ref().err().map(|error| Refusal { digest, error: error.clone() });
        self.remember(look, refusal);
        judged
    }

    fn remember(&self, look: Look<'_>, refusal: Option<Refusal>) {
        let mut last = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let news = refusal.as_ref().filter(|_| look.asked || refusal != *last);
        if let Some(Refusal { error, .. }) = news {
            self.kept_out.fetch_add(1, Ordering::Relaxed);
            let (part, cause) = (self.name, look.cause);
            tracing::error!(%error, part, cause, "certificates not reloaded; the last valid ones stay in force");
        }
        *last = refusal;
    }

    /// Whether what lies there now was refused.
    pub(super) fn is_refusing(&self) -> bool {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// It came into force.
    pub(super) fn took(&self) {
        self.taken.fetch_add(1, Ordering::Relaxed);
    }

    /// Its name, and how often it was taken and kept out.
    pub(super) fn figures(&self) -> (&'static str, u64, u64) {
        (self.name, self.taken.load(Ordering::Relaxed), self.kept_out.load(Ordering::Relaxed))
    }
}
