//! A watch: reads the history from where it stands, then waits for the next revision.
//!
//! There is one path for the past and the present, so there is no seam between them where an event could be lost or
//! told twice. Nothing is queued for a watcher: one that is slow holds up nobody, and finds its history compacted
//! when it fell too far behind.

use std::sync::{Arc, Weak};

use futures_util::stream;
use tokio::sync::watch::Receiver;

use super::engine::{Inner, closed};
use crate::kv::{Event, KvError, Revision, Watch};

/// How many events are read at once.
const BATCH: usize = 256;

/// A half-open range of keys: from the first up to, not including, the second; without a second to the last.
#[derive(Clone)]
pub(super) struct Keys {
    pub(super) start: Vec<u8>,
    pub(super) end: Option<Vec<u8>>,
}

impl Keys {
    /// The keys that start with `prefix`.
    pub(super) fn under(prefix: &[u8]) -> Self {
        let end = prefix.iter().rposition(|byte| *byte != u8::MAX).and_then(|last| {
            let (head, tail) = prefix.split_at_checked(last)?;
            let raised = tail.first()?.saturating_add(1);
            Some([head, &[raised]].concat())
        });
        Self { start: prefix.to_vec(), end }
    }

    /// Those of them that come after `key`.
    pub(super) fn after(self, key: &[u8]) -> Self {
        if key.is_empty() || key < self.start.as_slice() {
            self
        } else {
            Self { start: successor(key), ..self }
        }
    }
}

/// The key that comes next after `key` in the order of bytes.
pub(super) fn successor(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

/// Where a watcher stands: everything before this revision and key was told.
#[derive(Clone)]
pub(super) struct Position {
    pub(super) revision: Revision,
    pub(super) key: Vec<u8>,
}

pub(super) struct Watcher {
    /// Weak, so that a forgotten watch does not keep the file open.
    store: Weak<Inner>,
    latest: Receiver<Revision>,
    keys: Keys,
    position: Position,
    batch: std::vec::IntoIter<Event>,
}

impl Watcher {
    pub(super) fn new(store: &Arc<Inner>, latest: Receiver<Revision>, prefix: &[u8], from: Revision) -> Self {
        Self {
            store: Arc::downgrade(store),
            latest,
            keys: Keys::under(prefix),
            position: Position { revision: from, key: Vec::new() },
            batch: Vec::new().into_iter(),
        }
    }

    /// Ends after its first error.
    pub(super) fn into_stream(self) -> Watch {
        Box::pin(stream::unfold(Some(self), |watcher: Option<Self>| async move {
            let mut watcher = watcher?;
            match watcher.next().await {
                Ok(event) => Some((Ok(event), Some(watcher))),
                Err(error) => Some((Err(error), None)),
            }
        }))
    }

    async fn next(&mut self) -> Result<Event, KvError> {
        loop {
            if let Some(event) = self.batch.next() {
                return Ok(event);
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> Result<(), KvError> {
        let awaited = self.position.revision;
        // INVARIANT: a revision is announced after its transaction is committed, so that all history up to it shows.
        let latest = *self.latest.wait_for(|latest| *latest >= awaited).await.map_err(|_| closed())?;
        let store = self.store.upgrade().ok_or_else(closed)?;
        // INVARIANT: the connection is never held by a stream, which nobody has to poll: whoever waits for a watch and
        // for something else would come to wait for itself.
        let (keys, position) = (self.keys.clone(), self.position.clone());
        let read = tokio::spawn(async move { store.history(&keys, &position, latest, BATCH).await });
        let events = read.await.map_err(|_| closed())??;
        self.position = match events.last() {
            Some(last) if events.len() == BATCH => {
                Position { revision: last.revision, key: successor(&last.key) }
            }
            _ => Position { revision: latest.saturating_add(1), key: Vec::new() },
        };
        self.batch = events.into_iter();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_where_its_last_byte_can_still_grow() {
        let cases: [(&[u8], Option<&[u8]>); 6] = [
            (b"", None),
            (b"a", Some(b"b")),
            (b"a/", Some(b"a0")),
            (b"a\xff", Some(b"b")),
            (b"a\xfe\xff\xff", Some(b"a\xff")),
            (b"\xff\xff", None),
        ];
        for (prefix, end) in cases {
            assert_eq!(Keys::under(prefix).end.as_deref(), end, "{prefix:?}");
        }
    }

    #[test]
    fn after_is_exclusive_and_never_leaves_the_prefix() {
        assert_eq!(Keys::under(b"b").after(b"").start, b"b");
        assert_eq!(Keys::under(b"b").after(b"a").start, b"b");
        assert_eq!(Keys::under(b"b").after(b"b").start, b"b\0");
        assert_eq!(Keys::under(b"b").after(b"b/x").start, b"b/x\0");
        let beyond = Keys::under(b"b").after(b"c");
        assert!(beyond.end.is_some_and(|end| beyond.start > end), "an empty range");
    }
}
