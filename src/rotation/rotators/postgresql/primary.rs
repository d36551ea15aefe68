//! Finding the server that takes writes, and seeing that it is the right one, and the only one.
//!
//! ```text
//! hosts, all at once ─▶ log in ─▶ observe ─┬─▶ of another cluster: nothing is done anywhere
//!                                          ├─▶ takes writes ─┬─▶ one:  the primary
//!                                          │                 └─▶ more: nothing is done anywhere
//!                                          └─▶ standby, no answer, no login: why there is no primary, if there is none
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::time::timeout;

use super::credential::Credential;
use super::session::{Door, NoAnswer, NoSession, Row, Session};
use super::settings::{Place, Settings};
use super::{failed, statements};
use crate::rotation::{Failure, Trouble};

/// How much longer the other hosts are waited for when one was found that takes writes: long enough for one that
/// answers, short enough for a step.
const OTHERS: Duration = Duration::from_secs(3);

/// The admin's session with the primary.
pub(super) struct Primary<'a> {
    pub(super) session: Session,
    settings: &'a Settings,
    place: &'a Place,
    /// The cluster's system identifier.
    pub(super) identifier: String,
    started: String,
}

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Observed {
    pub(super) is_standby: bool,
    pub(super) identifier: String,
    /// When it started, in seconds since 1970: with the identifier, it tells one server by two names from two servers.
    pub(super) started: String,
}

/// What was found at one host.
enum Found {
    /// A server that is not in recovery.
    Writer(Session, Observed),
    Standby,
    /// It is of another cluster.
    Foreign(Failure),
    /// No login.
    Closed(NoSession),
    /// It ended, or did not say what it is.
    Lost(String),
    /// The admin may not ask it what it is.
    Mute(Failure),
}

/// What was found at the hosts that are not the primary. The worst counts.
#[derive(Default)]
struct Others {
    standby: Option<String>,
    unavailable: Option<String>,
    person: Option<Failure>,
    /// The first that is of another cluster.
    foreign: Option<Failure>,
}

impl<'a> Primary<'a> {
    /// Logs in as the admin at all hosts, and gives the session with the only one that is not a standby. `fingerprint`:
    /// which cluster it was before, where that is known.
    pub(super) async fn find(
        settings: &'a Settings,
        admin: &Credential,
        fingerprint: Option<&str>,
    ) -> Result<Self, Failure> {
        let (writers, others) = sorted(settings, look(settings, admin, fingerprint).await);
        let problem = others.foreign.clone().or_else(|| rivals(&writers));
        let mut writers = writers.into_iter();
        let first = writers.next();
        join_all(writers.map(|writer| writer.session.end())).await;
        match (first, problem) {
            (None, None) => Err(others.failure()),
            (None, Some(failure)) => Err(failure),
            (Some(writer), Some(failure)) => {
                writer.session.end().await;
                Err(failure)
            }
            (Some(mut writer), None) => {
                let settled = writer.session.query(statements::SETTLE).await;
                settled.map_err(|answer| failed(answer, "begin its session"))?;
                Ok(writer)
            }
        }
    }

    /// Where the primary is, for another login there: the same address, and so the same server.
    pub(super) fn door(&self) -> Door<'a> {
        door(self.settings, self.place, Some(self.session.address()))
    }
}

/// What is found at each host, in the definition's order; at the slow ones only where none takes writes.
async fn look<'a>(
    settings: &'a Settings,
    admin: &Credential,
    fingerprint: Option<&str>,
) -> Vec<(&'a Place, Found)> {
    let mut looks = FuturesUnordered::new();
    for (index, place) in settings.hosts.iter().enumerate() {
        looks.push(look_at(settings, (index, place), admin, fingerprint));
    }
    let mut all = Vec::with_capacity(settings.hosts.len());
    while let Some(seen) = looks.next().await {
        let writes = matches!(seen.2, Found::Writer(..));
        all.push(seen);
        if writes {
            break;
        }
    }
    let rest = async {
        while let Some(seen) = looks.next().await {
            all.push(seen);
        }
    };
    let _ = timeout(OTHERS, rest).await;
    all.sort_unstable_by_key(|(index, ..)| *index);
    all.into_iter().map(|(_, place, found)| (place, found)).collect()
}

/// Looks at one host. Only a session with one that takes writes stays open.
async fn look_at<'a>(
    settings: &'a Settings,
    (index, place): (usize, &'a Place),
    admin: &Credential,
    fingerprint: Option<&str>,
) -> (usize, &'a Place, Found) {
    let mut session = match Session::open(&door(settings, place, None), admin).await {
        Ok(session) => session,
        Err(failure) => return (index, place, Found::Closed(failure)),
    };
    let observed = observe(&mut session).await;
    let found = match observed {
        Ok(observed) => match belongs(settings, fingerprint, place, &observed) {
            Ok(()) if observed.is_standby => Found::Standby,
            Ok(()) => return (index, place, Found::Writer(session, observed)),
            Err(failure) => Found::Foreign(failure),
        },
        Err(NoAnswer::Lost(why)) => Found::Lost(format!("{place}: {why}")),
        Err(answer) => Found::Mute(failed(answer, "read pg_control_system()")),
    };
    session.end().await;
    (index, place, found)
}

fn sorted<'a>(settings: &'a Settings, all: Vec<(&'a Place, Found)>) -> (Vec<Primary<'a>>, Others) {
    let (mut writers, mut others) = (Vec::new(), Others::default());
    for (place, found) in all {
        match found {
            Found::Writer(session, Observed { identifier, started, .. }) => {
                writers.push(Primary { session, settings, place, identifier, started });
            }
            Found::Standby => others.standby = Some(place.to_string()),
            Found::Foreign(failure) => others.foreign = others.foreign.or(Some(failure)),
            Found::Closed(failure) => others.note(failure),
            Found::Lost(why) => others.unavailable = Some(why),
            Found::Mute(failure) => others.person = Some(failure),
        }
    }
    (writers, others)
}

/// Where more than one server takes writes, what is written to one is lost when the other one wins.
fn rivals(writers: &[Primary<'_>]) -> Option<Failure> {
    let (first, rest) = writers.split_first()?;
    let id = |writer: &Primary<'_>| (writer.identifier.clone(), writer.started.clone());
    let second = rest.iter().find(|other| id(other) != id(first))?;
    Some(Failure::new(
        Trouble::TargetUnavailable,
        format!(
            "two hosts take writes: {} and {}; nothing is changed until only one of them does: shut the other one down, \
             or make it a standby again",
            first.place, second.place
        ),
    ))
}

impl Others {
    fn note(&mut self, failure: NoSession) {
        let person = |trouble, message: String| Some(Failure::new(trouble, message));
        match failure {
            NoSession::Unavailable(why) => self.unavailable = Some(why),
            NoSession::Rejected(why) => {
                self.person = person(Trouble::AdminRejected, format!("the admin is rejected: {why}"));
            }
            NoSession::Unverifiable(why) => {
                self.person =
                    person(Trouble::Unverifiable, format!("the admin's login proves nothing: {why}"));
            }
            NoSession::Admitted(error) if error.code == "42501" => {
                self.person = person(Trouble::PrivilegeMissing, format!("the admin can't connect: {error}"));
            }
            NoSession::Admitted(error) => {
                self.person = person(Trouble::ValueUnfit, format!("`database` in the definition: {error}"));
            }
        }
    }

    /// A host that can't be reached may be the primary; so only where all can, there is none.
    fn failure(self) -> Failure {
        match (self.person, self.unavailable, self.standby) {
            (Some(failure), _, _) => failure,
            (None, Some(why), _) => Failure::new(Trouble::TargetUnavailable, why),
            (None, None, Some(place)) => Failure::new(
                Trouble::TargetReadOnly,
                format!("{place} is a standby, and so is every other host"),
            ),
            (None, None, None) => Failure::new(Trouble::Defect, "a definition without hosts"),
        }
    }
}

pub(super) fn door<'a>(settings: &'a Settings, place: &'a Place, address: Option<SocketAddr>) -> Door<'a> {
    Door { place, address, encryption: &settings.encryption, database: &settings.database }
}

/// Asks a server whether it is a standby, and of which cluster.
pub(super) async fn observe(session: &mut Session) -> Result<Observed, NoAnswer> {
    let rows = session.query(statements::OBSERVE).await?;
    let columns = rows.first().map(Row::as_slice);
    match columns {
        Some([Some(standby), Some(identifier), Some(started)]) => {
            let (identifier, started) = (identifier.clone(), started.clone());
            Ok(Observed { is_standby: standby != "f", identifier, started })
        }
        _ => Err(NoAnswer::Lost("the server did not say what it is".to_owned())),
    }
}

/// Whether a server is of the cluster that is rotated.
pub(super) fn belongs(
    settings: &Settings,
    fingerprint: Option<&str>,
    place: &Place,
    observed: &Observed,
) -> Result<(), Failure> {
    let found = &observed.identifier;
    for expected in [settings.system_identifier.as_deref(), fingerprint].into_iter().flatten() {
        if expected != found {
            return Err(Failure::new(
                Trouble::WrongTarget,
                format!(
                    "{place} has the system identifier {found}, and not {expected}: it is another cluster"
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::rotators::postgresql::session::ServerError;

    fn noted(failures: Vec<NoSession>, standby: bool) -> Trouble {
        let mut others = Others { standby: standby.then(|| "h:1".to_owned()), ..Others::default() };
        failures.into_iter().for_each(|failure| others.note(failure));
        others.failure().trouble
    }

    #[test]
    fn only_standbys_make_a_target_read_only() {
        let down = || NoSession::Unavailable("h:1: refused".to_owned());
        assert_eq!(noted(vec![], true), Trouble::TargetReadOnly);
        assert_eq!(noted(vec![down()], true), Trouble::TargetUnavailable);
        assert_eq!(noted(vec![down()], false), Trouble::TargetUnavailable);
        assert_eq!(noted(vec![down(), NoSession::Rejected("no".to_owned())], true), Trouble::AdminRejected);
        assert_eq!(noted(vec![NoSession::Unverifiable("trust".to_owned())], false), Trouble::Unverifiable);
        let error = |code: &str| ServerError { code: code.to_owned(), message: "no".to_owned() };
        assert_eq!(noted(vec![NoSession::Admitted(error("3D000"))], false), Trouble::ValueUnfit);
        assert_eq!(noted(vec![NoSession::Admitted(error("42501"))], false), Trouble::PrivilegeMissing);
    }
}
