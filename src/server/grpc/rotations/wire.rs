//! Rotations as the wire has them.

use std::time::Duration;

use super::super::convert;
use crate::broker::BrokerError;
use crate::proto::v1;
use crate::rotation::Failure;
use crate::rotation::engine::{Over, Told};
use crate::rotation::machine::Ending;
use crate::rotation::record::{Ended, Health, Rotation, Run};
use crate::rotation::service::{Due, Shown};
use crate::secret::{SecretId, VersionId};

/// How many of those that are due are over.
#[derive(Default)]
pub(super) struct Counts {
    done: u64,
    total: u64,
}

impl Counts {
    /// What is said of one thing that is told, with the counts so far.
    pub(super) fn say(&mut self, due: Due) -> v1::RotateDueResponse {
        let step = match due {
            Due::Total(total) => {
                self.total = total;
                None
            }
            Due::Done(done) => {
                self.done = done;
                None
            }
            Due::Step(id, told) => Some(step(&id, told)),
        };
        v1::RotateDueResponse { step, done: self.done, total: self.total }
    }
}

/// What happens to one secret.
pub(super) fn step(id: &SecretId, told: Told) -> v1::RotationStep {
    match told {
        Told::Phase { token, phase } => {
            v1::RotationStep { version_id: version_id(token), phase: phase.as_str().to_owned(), ..of(id) }
        }
        Told::Over(over) => came_out(id, over),
    }
}

fn came_out(id: &SecretId, over: Over) -> v1::RotationStep {
    let step = |result: &str| v1::RotationStep { result: result.to_owned(), ..of(id) };
    match over {
        Over::Ended { ending, token } => {
            v1::RotationStep { version_id: version_id(token), ..step(ending_name(ending)) }
        }
        Over::InProgress { token, phase } => v1::RotationStep {
            version_id: version_id(token),
            phase: phase.as_str().to_owned(),
            ..step("in_progress")
        },
        Over::Unfinished { token, failure, retry_at } => v1::RotationStep {
            version_id: version_id(token),
            retry_at: Some(convert::timestamp(retry_at)),
            trouble: Some(trouble(&failure)),
            ..step(if failure.trouble.needs_a_person() { "blocked" } else { "unfinished" })
        },
        Over::Skipped { until } | Over::TooSoon { until } => {
            v1::RotationStep { retry_at: Some(convert::timestamp(until)), ..step("skipped") }
        }
        Over::Paused | Over::NotSet => step("skipped"),
        Over::Refused(failure) => v1::RotationStep { trouble: Some(trouble(&failure)), ..step("refused") },
    }
}

fn of(id: &SecretId) -> v1::RotationStep {
    v1::RotationStep {
        environment: id.environment.to_string(),
        name: id.name.to_string(),
        ..v1::RotationStep::default()
    }
}

fn version_id(token: Option<VersionId>) -> String {
    token.map(|token| token.to_string()).unwrap_or_default()
}

const fn ending_name(ending: Ending) -> &'static str {
    match ending {
        Ending::Rotated => "rotated",
        Ending::Superseded => "superseded",
        Ending::Aborted => "aborted",
        Ending::Discarded => "discarded",
    }
}

fn trouble(failure: &Failure) -> v1::RotationTrouble {
    v1::RotationTrouble {
        code: failure.trouble.code().to_owned(),
        message: failure.message.clone(),
        mend: failure.trouble.mend().to_owned(),
        needs_person: failure.trouble.needs_a_person(),
    }
}

/// A rotation in an answer that is about it alone.
pub(super) fn whole(shown: Shown) -> Result<v1::Rotation, BrokerError> {
    let Shown { id, rotation, min_gap } = shown;
    let rotation = rotation?;
    let brief = brief(&id, &rotation, min_gap);
    let definition = rotation.definition.to_toml();
    Ok(v1::Rotation { history: rotation.history.into_iter().rev().map(ended).collect(), definition, ..brief })
}

/// A rotation among others. One whose record can't be read is among them, with the reason.
pub(super) fn listed(shown: Shown) -> v1::Rotation {
    match &shown.rotation {
        Ok(rotation) => brief(&shown.id, rotation, shown.min_gap),
        Err(failure) => v1::Rotation {
            environment: shown.id.environment.to_string(),
            name: shown.id.name.to_string(),
            health: v1::RotationHealth::Blocked.into(),
            run: Some(v1::RotationRun { trouble: Some(trouble(failure)), ..v1::RotationRun::default() }),
            ..v1::Rotation::default()
        },
    }
}

fn brief(id: &SecretId, rotation: &Rotation, min_gap: Duration) -> v1::Rotation {
    // While there is a run, or a pause, nothing begins when the record says.
    let waits = rotation.run.is_none() && !rotation.paused;
    v1::Rotation {
        environment: id.environment.to_string(),
        name: id.name.to_string(),
        rotator: rotation.definition.rotator.clone(),
        schedule: rotation.definition.schedule.to_string(),
        health: health(rotation.health()).into(),
        next_at: waits.then(|| convert::timestamp(rotation.next_at)),
        rotated_at: rotation.rotated_at.map(convert::timestamp),
        run: rotation.run.as_ref().map(run),
        min_gap: prost_types::Duration::try_from(min_gap).ok(),
        ..v1::Rotation::default()
    }
}

const fn health(health: Health) -> v1::RotationHealth {
    match health {
        Health::Idle => v1::RotationHealth::Idle,
        Health::Running => v1::RotationHealth::Running,
        Health::Degraded => v1::RotationHealth::Degraded,
        Health::Blocked => v1::RotationHealth::Blocked,
        Health::Paused => v1::RotationHealth::Paused,
    }
}

fn run(run: &Run) -> v1::RotationRun {
    v1::RotationRun {
        version_id: version_id(run.progress.as_ref().map(|progress| progress.token.clone())),
        phase: run.phase().as_str().to_owned(),
        started_at: Some(convert::timestamp(run.started_at)),
        asked_by: run.asked_by.clone(),
        attempt: run.attempt,
        not_before: Some(convert::timestamp(run.not_before)),
        trouble: run.failure.as_ref().map(trouble),
        aborting: run.abort,
    }
}

fn ended(ended: Ended) -> v1::EndedRotation {
    v1::EndedRotation {
        ending: ending_name(ended.ending).to_owned(),
        version_id: version_id(ended.token),
        started_at: Some(convert::timestamp(ended.started_at)),
        ended_at: Some(convert::timestamp(ended.ended_at)),
        asked_by: ended.asked_by,
        failures: ended.failures,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned as _};
    use crate::rotation::Trouble;
    use crate::rotation::definition::Definition;
    use crate::rotation::machine::Phase;
    use jiff::Timestamp;

    fn id() -> SecretId {
        SecretId::parse("development", "jwt").unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn unfinished(trouble: Trouble) -> Over {
        let failure = Failure::new(trouble, "what happened");
        Over::Unfinished { token: Some(token()), failure, retry_at: at(60) }
    }

    fn token() -> VersionId {
        VersionId::parse(&"v".repeat(32)).unwrap()
    }

    fn phase(phase: Phase) -> Told {
        Told::Phase { token: Some(token()), phase }
    }

    #[test]
    fn a_step_says_the_phase_or_the_result() {
        let set = step(&id(), phase(Phase::Set));
        assert_eq!((set.environment.as_str(), set.name.as_str()), ("development", "jwt"));
        assert_eq!((set.phase.as_str(), set.result.as_str()), ("set", ""));
        assert_eq!(set.version_id, "v".repeat(32));
        let refused = Failure::new(Trouble::SecretMissing, "none");
        for (over, result) in [
            (Over::Ended { ending: Ending::Rotated, token: Some(token()) }, "rotated"),
            (Over::Ended { ending: Ending::Superseded, token: None }, "superseded"),
            (Over::Ended { ending: Ending::Aborted, token: None }, "aborted"),
            (Over::Ended { ending: Ending::Discarded, token: None }, "discarded"),
            (Over::InProgress { token: None, phase: Phase::Set }, "in_progress"),
            (unfinished(Trouble::TargetUnavailable), "unfinished"),
            (unfinished(Trouble::WrongTarget), "blocked"),
            (Over::Skipped { until: at(60) }, "skipped"),
            (Over::TooSoon { until: at(60) }, "skipped"),
            (Over::Paused, "skipped"),
            (Over::NotSet, "skipped"),
            (Over::Refused(refused), "refused"),
        ] {
            assert_eq!(came_out(&id(), over).result, result);
        }
        let blocked = came_out(&id(), unfinished(Trouble::WrongTarget));
        let trouble = blocked.trouble.unwrap();
        assert_eq!((trouble.code.as_str(), trouble.message.as_str()), ("wrong_target", "what happened"));
        assert!(trouble.needs_person && trouble.mend == Trouble::WrongTarget.mend());
        assert_eq!(blocked.retry_at.unwrap().seconds, 60);
    }

    #[test]
    fn counts_come_with_every_message() {
        let mut counts = Counts::default();
        let said = [
            Due::Total(2),
            Due::Step(id(), phase(Phase::Create)),
            Due::Step(id(), Told::Over(Over::Ended { ending: Ending::Rotated, token: None })),
            Due::Done(1),
        ]
        .map(|due| counts.say(due));
        let shown = said.map(|said| (said.step.is_some(), said.done, said.total));
        assert_eq!(shown, [(false, 0, 2), (true, 0, 2), (true, 0, 2), (false, 1, 2)]);
    }

    #[test]
    fn one_that_can_not_be_read_is_listed_with_the_reason_and_refused_alone() {
        let unreadable = || Shown {
            id: id(),
            rotation: Err(Failure::new(Trouble::RecordUnreadable, "cut short")),
            min_gap: Duration::ZERO,
        };
        let listed = listed(unreadable());
        assert_eq!((listed.name.as_str(), listed.health()), ("jwt", v1::RotationHealth::Blocked));
        assert_eq!(listed.run.unwrap().trouble.unwrap().code, "record_unreadable");
        assert_eq!(whole(unreadable()).unwrap_err().reason(), Reason::Tampered);
    }

    #[test]
    fn a_rotation_alone_has_its_definition_and_newest_run_first_and_waits_only_where_nothing_is_in_progress()
    {
        let text = "rotator = \"random\"\nschedule = \"every 30d\"\n";
        let mut rotation = Rotation::new(Definition::parse(text).unwrap(), at(60));
        for (number, ending) in [(0, Ending::Aborted), (100, Ending::Rotated)] {
            rotation.run = Some(Run::new(rotation.definition.clone(), "schedule".to_owned(), at(number)));
            rotation.ended(ending, at(number + 10));
        }
        let show = |rotation: &Rotation| {
            let min_gap = Duration::from_secs(330);
            whole(Shown { id: id(), rotation: Ok(rotation.clone()), min_gap }).unwrap()
        };
        let shown = show(&rotation);
        assert_eq!(Definition::parse(&shown.definition).unwrap(), rotation.definition);
        let endings: Vec<_> = shown.history.iter().map(|ended| ended.ending.as_str()).collect();
        assert_eq!(endings, ["rotated", "aborted"]);
        assert_eq!(shown.health(), v1::RotationHealth::Idle);
        assert_eq!(shown.next_at.map(|time| time.seconds), Some(60));
        assert_eq!(shown.rotated_at.map(|time| time.seconds), Some(110));
        assert_eq!(shown.min_gap.map(|gap| gap.seconds), Some(330));

        let paused = show(&Rotation { paused: true, ..rotation.clone() });
        assert_eq!((paused.health(), paused.next_at), (v1::RotationHealth::Paused, None));
        let mut run = Run::new(rotation.definition.clone(), "User::\"ana\"".to_owned(), at(200));
        run.failure = Some(Failure::new(Trouble::WrongTarget, "another server"));
        rotation.run = Some(run);
        let blocked = show(&rotation);
        assert_eq!((blocked.health(), blocked.next_at), (v1::RotationHealth::Blocked, None));
        let run = blocked.run.unwrap();
        assert_eq!((run.phase.as_str(), run.asked_by.as_str()), ("create", "User::\"ana\""));
        assert_eq!(run.trouble.unwrap().code, "wrong_target");
    }
}
