//! Work on rotations that is under way, whoever asked for it, so that the broker's end can wait for the last of it.

use std::sync::Arc;

use tokio::sync::{OwnedRwLockReadGuard, RwLock, watch};

use super::said;
use crate::broker::BrokerError;
use crate::error::Reason;

/// The work that is under way. Each part holds the lock shared; the end takes it alone.
#[derive(Debug, Clone)]
pub(in crate::rotation) struct Tasks {
    running: Arc<RwLock<()>>,
    ending: Arc<watch::Sender<bool>>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self { running: Arc::default(), ending: Arc::new(watch::Sender::new(false)) }
    }
}

impl Tasks {
    /// Whether there is an end to wait for.
    pub(in crate::rotation) fn is_ending(&self) -> bool {
        *self.ending.borrow()
    }

    /// Waits for the end to begin.
    pub(in crate::rotation) async fn ending(&self) {
        said(&mut self.ending.subscribe()).await;
    }

    /// A part of the work, until it is dropped; `None` where nothing may begin any more.
    pub(in crate::rotation) async fn enter(&self) -> Option<OwnedRwLockReadGuard<()>> {
        if self.is_ending() {
            return None;
        }
        let running = Arc::clone(&self.running).read_owned().await;
        (!self.is_ending()).then_some(running)
    }

    /// Does `work` in a task of its own: it comes to its end although whoever asked for it is gone.
    pub(in crate::rotation) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, BrokerError>> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let Some(running) = self.enter().await else {
            let message = "the broker is ending; ask again after its next start";
            return Err(BrokerError::rejected(Reason::Unavailable, message));
        };
        let task = tokio::spawn(async move {
            let _running = running;
            work.await
        });
        task.await.unwrap_or_else(|error| {
            let message = format!("the work on the rotation did not finish: {error}");
            Err(BrokerError::rejected(Reason::Internal, message))
        })
    }

    /// Lets nothing begin any more, and waits for the last that did.
    pub(in crate::rotation) async fn drained(&self) {
        self.ending.send_replace(true);
        drop(self.running.write().await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reasoned as _;
    use std::time::Duration;
    use tokio::sync::oneshot;

    const HUNG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn work_outlives_its_caller_and_the_end_waits_for_it() {
        let tasks = Tasks::default();
        let (begun, has_begun) = oneshot::channel();
        let (finish, may_finish) = oneshot::channel();
        let (finished, mut has_finished) = oneshot::channel();
        let caller = tokio::spawn({
            let tasks = tasks.clone();
            async move {
                let work = async move {
                    begun.send(()).unwrap();
                    may_finish.await.unwrap();
                    finished.send(()).unwrap();
                    Ok(())
                };
                tasks.run(work).await
            }
        });
        tokio::time::timeout(HUNG, has_begun).await.unwrap().unwrap();
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
        let end = tokio::spawn({
            let tasks = tasks.clone();
            async move { tasks.drained().await }
        });
        tokio::time::timeout(HUNG, tasks.ending()).await.unwrap();
        assert!(!end.is_finished() && has_finished.try_recv().is_err());
        finish.send(()).unwrap();
        tokio::time::timeout(HUNG, end).await.unwrap().unwrap();
        has_finished.try_recv().unwrap();
    }

    #[tokio::test]
    async fn nothing_begins_after_the_end_has() {
        let tasks = Tasks::default();
        assert_eq!(tasks.run(async { Ok(1) }).await.unwrap(), 1);
        tasks.drained().await;
        assert!(tasks.enter().await.is_none());
        assert_eq!(tasks.run(async { Ok(1) }).await.unwrap_err().reason(), Reason::Unavailable);
    }

    #[tokio::test]
    async fn a_defect_in_a_task_is_an_error_of_its_caller() {
        let tasks = Tasks::default();
        let sound = tasks.is_ending();
        let work = async move {
            assert!(sound, "on purpose");
            Ok(())
        };
        let error = tasks.run(work).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Internal);
        tokio::time::timeout(HUNG, tasks.drained()).await.unwrap();
    }
}
