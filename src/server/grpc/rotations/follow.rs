//! Follows a rotation for as long as somebody reads.
//!
//! ```text
//! Rotations ─┬─ what is told ──▶ Following ─▶ stream: steps, then the last word or the error
//!            └─ how it ended ──▶    ▲
//!                                   └─ polled only while somebody reads; dropped with the reader
//! ```
//!
//! What is dropped with the reader is the waiting alone: the rotation is a task of its own, which comes to a phase's end.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use tokio::sync::mpsc;
use tonic::Status;

use super::super::status::status;
use crate::broker::BrokerError;

/// How much is kept of what is told to a reader who is behind.
const ROOM: usize = 4_096;
/// For so long the answer waits for a first word, so that a refusal is the call's own, and counts as one.
const HEAD_START: Duration = Duration::from_secs(2);

/// What is said while a rotation goes on, and at last how it ended.
pub(super) type Steps<M> = Pin<Box<dyn Stream<Item = Result<M, Status>> + Send>>;

/// A rotation that is looked at.
pub(super) struct Following<T, M> {
    told: mpsc::Receiver<T>,
    say: Box<dyn FnMut(T) -> M + Send>,
    run: Option<BoxFuture<'static, Result<Option<M>, BrokerError>>>,
    /// How it ended, until that is said.
    ended: Result<Option<M>, BrokerError>,
}

impl<T: Send + 'static, M: Send + 'static> Following<T, M> {
    /// Follows `run`: what it tells, as `say` puts it, and its last word.
    pub(super) fn of<F>(
        say: impl FnMut(T) -> M + Send + 'static,
        run: impl FnOnce(mpsc::Sender<T>) -> F,
    ) -> Self
    where
        F: Future<Output = Result<Option<M>, BrokerError>> + Send + 'static,
    {
        let (tell, told) = mpsc::channel(ROOM);
        Self { told, say: Box::new(say), run: Some(run(tell).boxed()), ended: Ok(None) }
    }

    /// The stream of what is said. What is refused at once is an error of the call itself.
    ///
    /// # Errors
    /// Why it did not begin.
    pub(super) async fn stream(mut self, request_id: Arc<str>) -> Result<Steps<M>, BrokerError> {
        let first = tokio::time::timeout(HEAD_START, self.next()).await;
        let first = first.ok().transpose()?.flatten();
        let rest = futures_util::stream::unfold(Some(self), move |following| {
            let request_id = request_id.clone();
            async move {
                let mut following = following?;
                match following.next().await {
                    Ok(message) => message.map(|message| (Ok(message), Some(following))),
                    Err(error) => Some((Err(status(&error, &request_id)), None)),
                }
            }
        });
        Ok(Box::pin(futures_util::stream::iter(first.map(Ok)).chain(rest)))
    }

    /// What is said next; `None`: it is over, and all was said. Whoever stops waiting misses nothing.
    async fn next(&mut self) -> Result<Option<M>, BrokerError> {
        if let Some(run) = &mut self.run {
            tokio::select! {
                biased;
                Some(told) = self.told.recv() => return Ok(Some((self.say)(told))),
                ended = run => {
                    self.run = None;
                    self.ended = ended;
                }
            }
        }
        // What was told before the end is said before the last word.
        match self.told.try_recv() {
            Ok(told) => Ok(Some((self.say)(told))),
            Err(_) => std::mem::replace(&mut self.ended, Ok(None)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned as _};
    use tokio::sync::oneshot;
    use tonic_types::StatusExt as _;

    type Ended = Result<Option<u64>, BrokerError>;

    /// Tells these at once, then ends so.
    fn following(told: &'static [u64], ended: Ended) -> Following<u64, u64> {
        Following::of(
            |told: u64| told * 10,
            |tell| async move {
                told.iter().for_each(|number| tell.try_send(*number).unwrap());
                ended
            },
        )
    }

    async fn all(steps: Steps<u64>) -> Vec<Result<u64, String>> {
        let reason = |status: Status| status.get_details_error_info().unwrap().reason;
        steps.map(|step| step.map_err(reason)).collect().await
    }

    fn denied() -> Ended {
        Err(BrokerError::rejected(Reason::Denied, "no"))
    }

    #[tokio::test]
    async fn all_that_was_told_is_said_before_the_last_word() {
        let steps = following(&[1, 2, 3], Ok(Some(7))).stream("r-1".into()).await.unwrap();
        assert_eq!(all(steps).await, [Ok(10), Ok(20), Ok(30), Ok(7)]);
        let steps = following(&[], Ok(None)).stream("r-1".into()).await.unwrap();
        assert!(all(steps).await.is_empty());
    }

    #[tokio::test]
    async fn a_refusal_is_the_call_s_own_and_a_failure_on_the_way_the_stream_s_end() {
        let refused = following(&[], denied()).stream("r-1".into()).await;
        assert_eq!(refused.err().unwrap().reason(), Reason::Denied);
        let steps = following(&[1], denied()).stream("r-1".into()).await.unwrap();
        assert_eq!(all(steps).await, [Ok(10), Err("DENIED".to_owned())]);
    }

    #[tokio::test]
    async fn a_step_is_said_as_it_is_told() {
        let (go_on, more) = oneshot::channel::<()>();
        let mut steps = Following::of(
            |told: u64| told,
            |tell| async move {
                tell.send(1).await.unwrap();
                more.await.unwrap();
                tell.send(2).await.unwrap();
                Ok(None)
            },
        )
        .stream("r-1".into())
        .await
        .unwrap();
        assert_eq!(steps.next().await.unwrap().unwrap(), 1);
        go_on.send(()).unwrap();
        assert_eq!(all(steps).await, [Ok(2)]);
    }

    #[tokio::test]
    async fn who_tells_hears_that_the_reader_is_gone() {
        let (told, telling) = oneshot::channel();
        let steps = Following::of(
            |told: u64| told,
            |tell| async move {
                tell.send(1).await.unwrap();
                told.send(tell).unwrap();
                std::future::pending::<Ended>().await
            },
        );
        drop(steps.stream("r-1".into()).await.unwrap());
        let tell = telling.await.unwrap();
        tokio::time::timeout(Duration::from_secs(60), tell.closed()).await.expect("hung");
    }
}
