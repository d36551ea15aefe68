//! PostgreSQL, two login roles that take turns: the one that AWSCURRENT names keeps its password while the other one
//! gets a new one, so that AWSCURRENT can log in at every instant.
//!
//! ```text
//!               ┌── shop_a ── LOGIN, member of ──┐
//! AWSCURRENT ───┤                                ├─▶ shop_owner (NOLOGIN): owns everything, and both act as it
//! AWSPENDING ───┤                                │   (ALTER ROLE … SET role TO shop_owner)
//!               └── shop_b ── LOGIN, member of ──┘
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `settings` | the definition's table |
//! | `credential` | the secret's values |
//! | `session`, `tls` | a connection, and what a login proves |
//! | `primary` | which host takes writes, and whether it is the right cluster |
//! | `statements`, `verifier` | what the server is told, behind a fence and without a password |
//! | `grants` | whether both users may do the same |
//!
//! # What has to be there
//!
//! The owner, what it owns, and an admin who is neither of the two users:
//!
//! ```sql
//! CREATE ROLE shop_owner NOLOGIN;
//! CREATE ROLE claviger_admin LOGIN CREATEROLE PASSWORD '…';
//! -- PostgreSQL 16 and later: CREATEROLE alone does not reach roles that somebody else made.
//! GRANT shop_owner TO claviger_admin WITH ADMIN OPTION;
//! GRANT shop_a, shop_b TO claviger_admin WITH ADMIN OPTION;   -- those of them that exist already
//! ```
//!
//! The admin needs no superuser, and no right on a table. Up to PostgreSQL 15 `CREATEROLE` is all of it: creating the
//! users, their passwords, their membership, their settings and their comments. `pg_control_system()`,
//! `pg_postmaster_start_time()` and `pg_stat_activity` are open to everyone unless somebody revoked that. The admin must
//! be let in to `database` at every one of `hosts`: at each is asked whether it takes writes, and where two do, nothing is
//! changed.
//!
//! `pg_hba.conf` must demand `scram-sha-256` (or `md5`, which asks for SCRAM where the verifier is one) of the admin and
//! of both users, best in lines of `hostssl` and not of `host`: a login is bound to the server's certificate, so that
//! no other server can pass it on, but a server that also takes logins without TLS can't tell. Its certificate must be
//! signed with RSA or ECDSA, and verifiers must have 4,096 iterations or more (the default).
//!
//! A pair of users belongs to one secret: what the fence in their comments says (`statements`). For another one to
//! take them over, clear both comments.
//!
//! A host may be reached through a pooler only where that keeps a session on one server connection; for `endpoints` any
//! will do. What the server's log shows of a change, with `log_statement` or where it fails, is the verifier, never the
//! password.

mod credential;
mod grants;
mod primary;
mod session;
mod settings;
mod statements;
mod tls;
mod verifier;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::{join_all, try_join_all};
use jiff::Timestamp;
use serde_json::{Map, Value};
use tokio::time::timeout;

use self::credential::{ADMIN, Credential, Pair};
use self::primary::{Observed, Primary, belongs, door, observe};
use self::session::{Door, NoAnswer, NoSession, Session, legible};
use self::settings::{Place, Settings};
use self::statements::{Fenced, identifier};
use super::{Entry, Probed, Rotator, SetOutcome, TestOutcome, Work};
use crate::rotation::machine::Probe;
use crate::rotation::{Failure, Trouble};
use crate::secret::{SecretName, SecretValue};

/// `rotator = "postgresql-alternating"`.
pub const ENTRY: Entry = Entry {
    kind: "postgresql-alternating",
    about: "two PostgreSQL roles that take turns: the current one always works",
    build,
};

/// The first pause before a standby is asked again; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// What a test takes besides waiting for endpoints: two logins, and what both users may do in a large catalog.
const COMPARING: Duration = Duration::from_secs(25);

fn build(table: &Map<String, Value>) -> Result<Arc<dyn Rotator>, String> {
    Ok(Arc::new(Alternating { settings: Settings::parse(table)? }))
}

#[derive(Debug)]
struct Alternating {
    settings: Settings,
}

#[async_trait]
impl Rotator for Alternating {
    fn has_target(&self) -> bool {
        true
    }

    fn target(&self) -> Option<String> {
        Some(self.settings.target())
    }

    fn admin(&self) -> Option<&SecretName> {
        Some(&self.settings.admin)
    }

    fn can_retire(&self) -> bool {
        true
    }

    fn patience(&self) -> Duration {
        self.settings.propagation + COMPARING
    }

    fn create(&self, current: &SecretValue, _now: Timestamp, refused: u32) -> Result<SecretValue, Failure> {
        let rules = &self.settings.password;
        let password = if refused == 0 { rules.generate() } else { rules.stricter().generate() }?;
        credential::next(&self.settings, current, &password)
    }

    fn check(&self, current: &SecretValue, pending: &SecretValue) -> Result<(), Failure> {
        Pair::read(&self.settings, current, pending).map(drop)
    }

    async fn identify(&self, work: &Work<'_>) -> Result<Option<String>, Failure> {
        let primary = self.primary(work).await?;
        primary.session.end().await;
        Ok(Some(primary.identifier))
    }

    async fn probe(&self, work: &Work<'_>, value: &SecretValue) -> Probed {
        let (probe, why) = match Credential::read("the value", value) {
            Ok(credential) => self.ask(work, &credential).await,
            Err(failure) => (Probe::Unknown, failure.message),
        };
        Probed { probe, why: legible(&why) }
    }

    async fn set(&self, work: &Work<'_>) -> Result<SetOutcome, Failure> {
        let pair = Pair::read(&self.settings, work.current, work.pending)?;
        let user = &pair.pending.username;
        let verifier = verifier::verifier(&pair.pending.password)?;
        let mut primary = self.primary(work).await?;
        self.roles_fit(&mut primary, user).await?;
        let change = self.fenced(work).set(user, &self.settings.owner, &verifier);
        let answer = primary.session.query(&change).await;
        primary.session.end().await;
        match answer {
            Ok(_) => Ok(SetOutcome::Done),
            Err(NoAnswer::Refused(error)) if error.code == statements::VALUE_REFUSED => {
                Ok(SetOutcome::Refused(legible(&error.message)))
            }
            Err(answer) => Err(self.not_changed(answer, work.fence)),
        }
    }

    async fn bar(&self, work: &Work<'_>) -> Result<(), Failure> {
        self.change(work, &self.fenced(work).bar()).await
    }

    async fn test(&self, work: &Work<'_>) -> Result<TestOutcome, Failure> {
        let pair = Pair::read(&self.settings, work.current, work.pending)?;
        let mut primary = self.primary(work).await?;
        match Session::open(&primary.door(), &pair.pending).await {
            Ok(session) => self.acts_as_owner(session).await?,
            Err(NoSession::Rejected(why)) => return Ok(TestOutcome::Rejected(legible(&why))),
            Err(failure) => return Err(not_tested(failure)),
        }
        grants::compare(&mut primary.session, &self.settings.users, &self.settings.owner).await?;
        primary.session.end().await;
        let mut arrivals = Vec::with_capacity(self.settings.endpoints.len());
        for place in &self.settings.endpoints {
            arrivals.push(self.arrives(place, &pair.pending, &primary.identifier));
        }
        try_join_all(arrivals).await?;
        Ok(TestOutcome::Passed)
    }

    /// Takes the old user's password away, not the role: its grants and its fence stay for the next turn. Sessions on
    /// standbys are not seen; none that is open is cut.
    async fn retire(&self, work: &Work<'_>) -> Result<(), Failure> {
        let old = Pair::read(&self.settings, work.current, work.pending)?.current.username;
        self.change(work, &self.fenced(work).retire(&old)).await
    }
}

impl Alternating {
    fn admin_of(&self, work: &Work<'_>) -> Result<Credential, Failure> {
        let missing = || Failure::new(Trouble::Defect, "a step was reached without the admin's value");
        Credential::read(ADMIN, work.admin.ok_or_else(missing)?)
    }

    async fn primary(&self, work: &Work<'_>) -> Result<Primary<'_>, Failure> {
        let admin = self.admin_of(work)?;
        let Settings { users, owner, .. } = &self.settings;
        if users.contains(&admin.username) || *owner == admin.username {
            return Err(Failure::new(
                Trouble::ValueUnfit,
                format!(
                    "the admin {} is one of the definition's `users` or its `owner`; name a role that is neither",
                    identifier(&admin.username)
                ),
            ));
        }
        Primary::find(&self.settings, &admin, work.fingerprint).await
    }

    fn fenced<'a>(&'a self, work: &Work<'a>) -> Fenced<'a> {
        Fenced { secret: work.id, users: &self.settings.users, fence: work.fence }
    }

    /// A change behind the fence, of which only the success matters.
    async fn change(&self, work: &Work<'_>, sql: &str) -> Result<(), Failure> {
        let mut primary = self.primary(work).await?;
        let answer = primary.session.query(sql).await;
        primary.session.end().await;
        answer.map(drop).map_err(|answer| self.not_changed(answer, work.fence))
    }

    /// Whether the roles are such that the user may be set.
    async fn roles_fit(&self, primary: &mut Primary<'_>, user: &str) -> Result<(), Failure> {
        let Settings { users: [first, second], owner, .. } = &self.settings;
        let asked = statements::roles(&[first, second, owner]);
        let rows = primary.session.query(&asked).await;
        let rows = rows.map_err(|answer| failed(answer, "look at the roles"))?;
        let mut has_owner = false;
        for row in &rows {
            let [Some(name), Some(superuser), Some(expired)] = row.as_slice() else { continue };
            has_owner |= name == owner;
            let quoted = identifier(name);
            if superuser != "f" {
                return Err(unfit(format!(
                    "the role {quoted} is a superuser, which must not be rotated like this"
                )));
            }
            if expired != "f" && name == user {
                return Err(unfit(format!(
                    "the role {quoted} is past its VALID UNTIL; run ALTER ROLE {quoted} VALID UNTIL 'infinity'"
                )));
            }
        }
        let quoted = identifier(owner);
        match has_owner {
            true => Ok(()),
            false => Err(unfit(format!(
                "the role {quoted} does not exist; run CREATE ROLE {quoted} NOLOGIN and have it own what the users use"
            ))),
        }
    }

    /// One login where the primary is. Who is not let in there may be the admin, too: then nothing but a login that
    /// succeeds can be told from anything.
    async fn ask(&self, work: &Work<'_>, credential: &Credential) -> (Probe, String) {
        match self.primary(work).await {
            Ok(primary) => {
                let door = primary.door();
                let expected = primary.identifier.clone();
                primary.session.end().await;
                self.knock(&door, credential, Some(&expected)).await
            }
            Err(failure) if failure.trouble == Trouble::WrongTarget || !failure.trouble.needs_a_person() => {
                (Probe::Unknown, failure.message)
            }
            Err(failure) => self.ask_without_admin(work, credential, failure).await,
        }
    }

    async fn ask_without_admin(
        &self,
        work: &Work<'_>,
        credential: &Credential,
        failure: Failure,
    ) -> (Probe, String) {
        let mut knocks = Vec::with_capacity(self.settings.hosts.len());
        for place in &self.settings.hosts {
            knocks.push(self.knock_at(place, credential, work.fingerprint));
        }
        let definite = |(probe, _): &(Probe, String)| !matches!(probe, Probe::Rejected | Probe::Unknown);
        join_all(knocks).await.into_iter().find(definite).unwrap_or((Probe::Unknown, failure.message))
    }

    async fn knock_at(
        &self,
        place: &Place,
        credential: &Credential,
        fingerprint: Option<&str>,
    ) -> (Probe, String) {
        self.knock(&door(&self.settings, place, None), credential, fingerprint).await
    }

    /// One login at one place, which must be the primary of the right cluster.
    async fn knock(
        &self,
        door: &Door<'_>,
        credential: &Credential,
        fingerprint: Option<&str>,
    ) -> (Probe, String) {
        let user = identifier(&credential.username);
        let mut session = match Session::open(door, credential).await {
            Ok(session) => session,
            Err(NoSession::Rejected(why)) => return (Probe::Rejected, why),
            Err(NoSession::Unverifiable(why)) => return (Probe::Unverifiable, why),
            Err(NoSession::Admitted(error)) => {
                return (Probe::Accepted, format!("the password of {user} is right, but: {error}"));
            }
            Err(NoSession::Unavailable(why)) => return (Probe::Unknown, why),
        };
        let observed = observe(&mut session).await;
        session.end().await;
        match observed {
            Ok(observed) => self.placed(door.place, fingerprint, &observed, &user),
            // The login is proven; it just may not see what the server says of itself.
            Err(NoAnswer::Refused(_)) => (Probe::Accepted, format!("{} accepts {user}", door.place)),
            Err(NoAnswer::Lost(why)) => (Probe::Unknown, format!("{}: {why}", door.place)),
        }
    }

    fn placed(
        &self,
        place: &Place,
        fingerprint: Option<&str>,
        observed: &Observed,
        user: &str,
    ) -> (Probe, String) {
        if let Err(failure) = belongs(&self.settings, fingerprint, place, observed) {
            return (Probe::Unknown, failure.message);
        }
        match observed.is_standby {
            true => (Probe::Unknown, format!("{place} is a standby")),
            false => (Probe::Accepted, format!("{place} accepts {user}")),
        }
    }

    async fn acts_as_owner(&self, mut session: Session) -> Result<(), Failure> {
        let rows = session.query(statements::WHO).await;
        session.end().await;
        let rows = rows.map_err(|answer| failed(answer, "say who it is"))?;
        match grants::who(&rows) {
            Some((_, acting)) if acting == self.settings.owner => Ok(()),
            Some((user, acting)) => Err(grants::acts_as_itself(user, acting, &self.settings.owner)),
            None => Err(Failure::new(Trouble::TargetUnavailable, "the server does not say who is logged in")),
        }
    }

    /// Waits until an endpoint, which may be a standby that is behind, accepts the new password.
    async fn arrives(&self, place: &Place, pending: &Credential, expected: &str) -> Result<(), Failure> {
        let mut last = None;
        let arrived = timeout(self.settings.propagation, self.knock_until(place, pending, &mut last)).await;
        let mut session = match (arrived, last) {
            (Ok(Ok(session)), _) => session,
            (Ok(Err(failure)), _) => return Err(not_tested(failure)),
            (Err(_), Some(NoSession::Rejected(why))) => {
                let within = self.settings.propagation.as_secs();
                let message = format!("the new password is not accepted within {within} s: {why}");
                return Err(Failure::new(Trouble::StandbyBehind, message));
            }
            (Err(_), Some(failure)) => return Err(not_tested(failure)),
            (Err(_), None) => {
                return Err(Failure::new(Trouble::TargetUnavailable, format!("{place} does not answer")));
            }
        };
        if let Ok(observed) = observe(&mut session).await {
            belongs(&self.settings, Some(expected), place, &observed)?;
        }
        self.acts_as_owner(session).await
    }

    /// Logs in until it succeeds, or can't succeed; `last` is why it did not the last time.
    async fn knock_until(
        &self,
        place: &Place,
        pending: &Credential,
        last: &mut Option<NoSession>,
    ) -> Result<Session, NoSession> {
        let mut next = FIRST_PAUSE;
        loop {
            match Session::open(&door(&self.settings, place, None), pending).await {
                Ok(session) => return Ok(session),
                Err(failure @ (NoSession::Rejected(_) | NoSession::Unavailable(_))) => *last = Some(failure),
                Err(failure) => return Err(failure),
            }
            pause(next).await;
            next = next.saturating_mul(2);
        }
    }

    /// Why a change behind the fence was not made, or may have been.
    fn not_changed(&self, answer: NoAnswer, fence: u64) -> Failure {
        let [first, second] = self.settings.users.each_ref().map(|user| identifier(user));
        let owner = identifier(&self.settings.owner);
        match answer {
            NoAnswer::Lost(why) => Failure::new(Trouble::Unanswered, why),
            NoAnswer::Refused(error) => match error.code.as_str() {
                statements::FENCED => Failure::new(
                    Trouble::Fenced,
                    format!("{first} and {second} carry the fence {}, higher than {fence}", error.message),
                ),
                statements::OWNED => owned(&error.message, &first, &second),
                // It passes by itself, when the last of them logs out.
                statements::IN_USE => Failure::new(
                    Trouble::StillInUse,
                    format!(
                        "{} session(s) of the user that was current before are still open",
                        error.message
                    ),
                ),
                statements::NO_ROLE => unfit(format!("neither {first} nor {second} exists at the server")),
                "42501" => Failure::new(
                    Trouble::PrivilegeMissing,
                    format!(
                        "the admin may not change {first} and {second}: {error}; it needs CREATEROLE and, from \
                         PostgreSQL 16 on, ADMIN OPTION on {owner}, {first} and {second}"
                    ),
                ),
                _ => failed(NoAnswer::Refused(error), "change the role"),
            },
        }
    }
}

/// The failure of a change of a user that another secret's rotation holds. `said`: that secret's mark, and the user.
fn owned(said: &str, first: &str, second: &str) -> Failure {
    let (mark, user) = said.split_once(' ').unwrap_or((said, "one of the users"));
    Failure::new(
        Trouble::Fenced,
        format!(
            "the rotation of another secret, {mark}, holds the user {}; to take it over on purpose, remove that one and \
             run COMMENT ON ROLE {first} IS NULL; COMMENT ON ROLE {second} IS NULL",
            identifier(user)
        ),
    )
}

/// Why the admin did not come to do something.
fn failed(answer: NoAnswer, what: &str) -> Failure {
    match answer {
        NoAnswer::Lost(why) => Failure::new(Trouble::TargetUnavailable, why),
        NoAnswer::Refused(error) => {
            let trouble = match error.code.as_str() {
                "42501" => Trouble::PrivilegeMissing,
                "25006" => Trouble::TargetReadOnly,
                _ => Trouble::TargetUnavailable,
            };
            Failure::new(trouble, format!("the session could not {what}: {error}"))
        }
    }
}

fn not_tested(failure: NoSession) -> Failure {
    let trouble = match &failure {
        NoSession::Unverifiable(_) => Trouble::Unverifiable,
        NoSession::Admitted(error) if error.code == "42501" => Trouble::GrantDrift,
        NoSession::Admitted(_) => Trouble::ValueUnfit,
        NoSession::Rejected(_) | NoSession::Unavailable(_) => Trouble::TargetUnavailable,
    };
    Failure::new(trouble, failure.to_string())
}

fn unfit(message: String) -> Failure {
    Failure::new(Trouble::ValueUnfit, message)
}

#[expect(
    clippy::disallowed_methods,
    reason = "between two logins at a standby that can't say when it is ready"
)]
async fn pause(length: Duration) {
    tokio::time::sleep(length).await;
}
