//! One activation: who has the lease works on the run, under a fence of its own.
//!
//! ```text
//! take ──▶ record with a fence + lease key, in one transaction ──▶ save, save, … ──▶ release
//!                                                                   └─ renew ─┘
//! ```
//!
//! The lease is for efficiency: that no two work on one run. What a pause defeats of it, the fence makes good: the
//! record has the last one given out, so whoever has another one changes nothing here, and nothing at the target.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;

use super::super::Failure;
use super::super::record::Rotation;
use super::{ATTEMPTS, LEASES, Ledger, Stored, contended, id_in, lease_key, unavailable};
use crate::kv::{Compare, Entry, KvError, LeaseId, Write};
use crate::secret::SecretId;

/// What to make of a record for which nobody has the lease.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "made once for an activation and taken apart at once")]
pub enum Begin<R> {
    /// To be written, with a run in it. The fence is seen to.
    Run(Rotation),
    /// Nothing is done, and why.
    No(R),
}

/// What came of trying to begin an activation.
#[derive(Debug)]
pub enum Taken<R> {
    /// The lease is ours, and this is the record.
    Mine(Lease, Rotation),
    /// Someone else has it. The record where it was read.
    Busy(Option<Rotation>),
    /// Nothing is to be done, and why.
    No(R),
    /// No rotation is set.
    Missing,
}

/// What came of saving under a lease.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "made once for a step and taken apart at once")]
pub enum Saved {
    /// It is done, and this is the record.
    Done(Rotation),
    /// The lease is over, or someone else has one with a higher fence.
    Lost,
}

/// The right to work on one rotation.
#[derive(Debug)]
pub struct Lease {
    id: SecretId,
    fence: u64,
    number: LeaseId,
    length: Duration,
    /// When it was last known to be given its full time, in milliseconds of the monotonic clock.
    renewed: AtomicU64,
}

impl Lease {
    /// Which rotation.
    #[must_use]
    pub const fn id(&self) -> &SecretId {
        &self.id
    }

    /// Higher than that of every activation of this rotation before it.
    #[must_use]
    pub const fn fence(&self) -> u64 {
        self.fence
    }

    /// Whether it can't be over yet, by this process's own monotonic clock, with a sixth of its length to spare for
    /// clocks that don't go alike.
    #[must_use]
    pub fn is_live(&self, monotonic_now: Duration) -> bool {
        self.age(monotonic_now) < self.length - self.length / 6
    }

    /// Whether a third of its length is not over yet: no need to renew it, and time for a step of another third.
    #[must_use]
    pub fn is_fresh(&self, monotonic_now: Duration) -> bool {
        self.age(monotonic_now) < self.length / 3
    }

    fn age(&self, monotonic_now: Duration) -> Duration {
        monotonic_now.saturating_sub(Duration::from_millis(self.renewed.load(Ordering::Acquire)))
    }

    fn note_renewal(&self, asked_at: Duration) {
        self.renewed.store(millis(asked_at), Ordering::Release);
    }
}

impl Ledger {
    /// Begins an activation, where nobody else is at it: takes the lease, and writes what `begin` makes of the record
    /// under a new fence, in one transaction. `begin` is asked again where someone else was first.
    ///
    /// A lease is free where there is none, where its time is over, or where it belongs to another boot of this
    /// instance, which is dead.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn take<R>(
        &self,
        id: &SecretId,
        mut begin: impl FnMut(Rotation) -> Begin<R>,
    ) -> Result<Taken<R>, Failure> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let Some(before) = self.stored(id).await? else { return Ok(Taken::Missing) };
            let holder = self.kv.get(&lease_key(id)).await.map_err(unavailable(id))?;
            if holder.as_ref().is_some_and(|holder| !self.succeeds(&holder.value)) {
                return Ok(Taken::Busy(Some(before.rotation)));
            }
            let mut next = match begin(before.rotation.clone()) {
                Begin::Run(next) => next,
                Begin::No(why) => return Ok(Taken::No(why)),
            };
            let revision = self.kv.revision().await.map_err(unavailable(id))?;
            next.fence = before.rotation.fence.max(revision).saturating_add(1);
            if let Some(lease) = self.claim(id, &before, holder.as_ref(), &next).await? {
                return Ok(Taken::Mine(lease, next));
            }
            last = Some(before.rotation);
        }
        Ok(Taken::Busy(last))
    }

    /// Changes the record, if the lease is still ours. `change` gets it as it is now, with what others did to it
    /// meanwhile (a pause, an abort, another definition), and is asked again where someone else was first.
    ///
    /// # Errors
    /// As [`get`](Self::get); [`Trouble::StoreUnavailable`](super::super::Trouble::StoreUnavailable) where others were
    /// first every time.
    pub async fn save(&self, lease: &Lease, mut change: impl FnMut(&mut Rotation)) -> Result<Saved, Failure> {
        let id = lease.id();
        for _ in 0..ATTEMPTS {
            let Some(holder) = self.held(lease).await? else { return Ok(Saved::Lost) };
            let before = self.stored(id).await?.filter(|stored| stored.rotation.fence == lease.fence);
            let Some(before) = before else { return Ok(Saved::Lost) };
            let mut after = before.rotation.clone();
            change(&mut after);
            after.fence = lease.fence;
            let mut transaction = self.change(id, Some(&before), Some(&after))?;
            transaction.compare.push(Compare::unchanged(lease_key(id), Some(&holder)));
            if self.commit(id, transaction).await? {
                return Ok(Saved::Done(after));
            }
        }
        Err(contended(id))
    }

    /// Gives a lease its full time again; `false` where it is over, or someone else has the rotation.
    ///
    /// # Errors
    /// [`Trouble::StoreUnavailable`](super::super::Trouble::StoreUnavailable): it may or may not have been done.
    pub async fn renew(&self, lease: &Lease) -> Result<bool, Failure> {
        if self.held(lease).await?.is_none() {
            return Ok(false);
        }
        // Before it is asked for: the lease can only last longer than we think.
        let asked_at = self.clock.monotonic();
        match self.kv.renew(lease.number).await {
            Ok(()) => lease.note_renewal(asked_at),
            Err(KvError::LeaseNotFound { .. }) => return Ok(false),
            Err(error) => return Err(unavailable(lease.id())(error)),
        }
        Ok(true)
    }

    /// Lets the next one have it. Where that fails, the lease ends by itself.
    pub async fn release(&self, lease: Lease) {
        self.let_go(&lease.id, lease.number).await;
    }

    /// Makes the runs that this instance was working on when it last died due at once, so that nobody waits for the
    /// leases of the dead. How many there were.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub async fn reclaim(&self) -> Result<u64, Failure> {
        const PAGE: usize = 256;
        let (mut reclaimed, mut after) = (0, Vec::new());
        loop {
            let page =
                self.kv.range(LEASES.as_bytes(), &after, PAGE).await.map_err(unavailable("any secret"))?;
            let ours = page.entries.iter().filter(|entry| self.succeeds(&entry.value));
            for id in ours.filter_map(|entry| id_in(&entry.key, LEASES)) {
                self.update(&id, |rotation| Ok((rotation.map(|rotation| self.due_now(rotation)), ())))
                    .await?;
                reclaimed += 1;
            }
            match page.entries.last() {
                Some(last) if page.more => after.clone_from(&last.key),
                _ => return Ok(reclaimed),
            }
        }
    }

    /// Only what is held back by the lease alone: what waits for another reason goes on waiting.
    fn due_now(&self, mut rotation: Rotation) -> Rotation {
        let now = self.clock.now();
        if let Some(run) = &mut rotation.run
            && run.not_before <= now.saturating_add(self.lease).unwrap_or(Timestamp::MAX)
        {
            run.not_before = run.not_before.min(now);
        }
        rotation
    }

    /// The lease and what `next` is, in one transaction; `None` where the record or its lease changed meanwhile.
    async fn claim(
        &self,
        id: &SecretId,
        before: &Stored,
        holder: Option<&Entry>,
        next: &Rotation,
    ) -> Result<Option<Lease>, Failure> {
        let place = lease_key(id);
        let mut transaction = self.change(id, Some(before), Some(next))?;
        let asked_at = self.clock.monotonic();
        let number = self.kv.lease(self.lease).await.map_err(unavailable(id))?;
        transaction.compare.push(Compare::unchanged(place.clone(), holder));
        let value = self.owner.clone().into_bytes();
        transaction.write.push(Write::Put { key: place, value, lease: Some(number) });
        let failed = match self.kv.commit(transaction).await {
            Ok(outcome) if outcome.succeeded => {
                let (id, fence, renewed) = (id.clone(), next.fence, AtomicU64::new(millis(asked_at)));
                return Ok(Some(Lease { id, fence, number, length: self.lease, renewed }));
            }
            Ok(_) | Err(KvError::LeaseNotFound { .. }) => None,
            Err(error) => Some(unavailable(id)(error)),
        };
        // Also where it is not known whether it was done: then nobody has the lease, and the run waits for its time.
        self.let_go(id, number).await;
        failed.map_or(Ok(None), Err)
    }

    async fn let_go(&self, id: &SecretId, number: LeaseId) {
        if let Err(error) = self.kv.release(number).await {
            tracing::debug!(secret = %id, %error, "a lease can't be given back; it ends by itself");
        }
    }

    /// The lease's key, where it is still ours.
    async fn held(&self, lease: &Lease) -> Result<Option<Entry>, Failure> {
        let holder = self.kv.get(&lease_key(&lease.id)).await.map_err(unavailable(&lease.id))?;
        Ok(holder.filter(|holder| holder.lease == Some(lease.number)))
    }

    /// Whether the holder of a lease is this instance at an earlier boot.
    fn succeeds(&self, holder: &[u8]) -> bool {
        let instance = |owner: &str| owner.rsplit_once('/').map(|(instance, _)| instance.to_owned());
        let holder = std::str::from_utf8(holder).unwrap_or_default();
        holder != self.owner && instance(holder).is_some() && instance(holder) == instance(&self.owner)
    }
}

fn millis(at: Duration) -> u64 {
    u64::try_from(at.as_millis()).unwrap_or(u64::MAX)
}
