//! Values. A version is always asked for by name: left out, AWS means AWSCURRENT, and a reader should not have to
//! know that.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_sdk_secretsmanager::operation::batch_get_secret_value::BatchGetSecretValueOutput;
use aws_sdk_secretsmanager::operation::get_secret_value::GetSecretValueOutput;
use aws_sdk_secretsmanager::primitives::{Blob, DateTime};
use aws_sdk_secretsmanager::types::{ApiErrorType, SecretValueEntry};
use futures_util::stream::{self, StreamExt};

use super::errors::{Failure, Kind, malformed};
use super::quota::Operation;
use super::{Aws, MOST_IN_BATCH, timestamp};
use crate::secret::{EnvironmentName, Label, SecretId, SecretValue, Selector, Version, VersionId};
use crate::store::{Fetched, Order, Source, StoreError};

/// A batch answers for at most [`MOST_IN_BATCH`] secrets, and a page may hold fewer than there are, or none. So many are
/// more than any batch needs.
const MOST_PAGES: usize = 2 * MOST_IN_BATCH;
/// How many calls of one request are under way at once: well below AWS's rates, well above one by one.
const AT_ONCE: usize = 8;
/// How long batches are not asked for once AWS has said that they are not permitted: what someone permits meanwhile is
/// found soon, and finding out costs a call and a round trip for whoever waits.
const FORBIDDEN_FOR: Duration = Duration::from_secs(300);

type Item = (SecretId, Selector);
type Answered = Result<Fetched, StoreError>;

impl Aws {
    /// One version with its value.
    pub(super) async fn fetch(&self, id: &SecretId, selector: &Selector) -> Answered {
        let name = self.name_in_aws(id)?;
        let request = self.client.get_secret_value().secret_id(&name);
        let request = match selector {
            Selector::Label(label) => request.version_stage(label.as_str()),
            Selector::Version(version) => request.version_id(version.as_str()),
        };
        let failure = match self.ask(Operation::GetSecretValue, request.send()).await {
            Ok(answer) => return Answer::from(answer).about(id, &name),
            Err(failure) => failure,
        };
        if failure.leaves_open_what_is_missing() {
            self.look(id).await?;
            return Err(StoreError::VersionNotFound { id: id.clone(), selector: selector.clone() });
        }
        Err(failure.about(id, Some(selector)))
    }

    /// Many values, in the order asked for. Only AWSCURRENT can be had in batches; the rest, and what a batch leaves
    /// unanswered, is fetched one by one.
    pub(super) async fn fetch_many(&self, items: &[Item]) -> Vec<Answered> {
        let now = self.clock.monotonic();
        let mut seen = HashSet::new();
        let distinct = items.iter().filter(|item| seen.insert(*item));
        let in_batches = self.batches.are_worth_asking_for(now);
        let (current, mut singles): (Vec<&Item>, Vec<&Item>) =
            distinct.partition(|(_, selector)| in_batches && *selector == Selector::CURRENT);
        let mut answers: HashMap<&Item, Answered> = HashMap::new();
        let batches: Vec<_> = current.chunks(MOST_IN_BATCH).map(|batch| self.fetch_batch(batch)).collect();
        let mut forbidden = false;
        for batch in at_once(batches).await {
            forbidden |= batch.forbidden;
            answers.extend(batch.answers);
        }
        singles.extend(current.iter().filter(|item| !answers.contains_key(*item)));
        let calls: Vec<_> = singles.iter().map(|(id, selector)| self.fetch(id, selector)).collect();
        let fetched = at_once(calls).await;
        // Where nothing can be read one by one either, it is not about batches.
        if forbidden && fetched.iter().any(Result::is_ok) {
            self.batches.are_forbidden(&self.environment, now);
        }
        answers.extend(singles.iter().copied().zip(fetched));
        items.iter().map(|item| answered(&answers, item)).collect()
    }

    async fn fetch_batch<'a>(&self, batch: &[&'a Item]) -> Batch<'a> {
        let asked: HashMap<String, &'a Item> =
            batch.iter().filter_map(|item| Some((self.name_in_aws(&item.0).ok()?, *item))).collect();
        let mut found = Batch::default();
        let mut next = None;
        for _ in 0..MOST_PAGES {
            let names = asked.keys().cloned().collect();
            let request =
                self.client.batch_get_secret_value().set_secret_id_list(Some(names)).set_next_token(next);
            match self.ask(Operation::BatchGetSecretValue, request.send()).await {
                Ok(page) => {
                    self.batches.are_permitted();
                    next = take_page(page, &asked, &mut found.answers);
                }
                Err(failure) => {
                    found.forbidden = failure.forbids_the_action();
                    take_failure(&failure, &asked, &mut found.answers);
                    next = None;
                }
            }
            if next.is_none() {
                break;
            }
        }
        found
    }
}

/// What came of one batch.
#[derive(Default)]
struct Batch<'a> {
    /// Who is missing here was not answered for.
    answers: HashMap<&'a Item, Answered>,
    /// Whether AWS said that batches are not permitted.
    forbidden: bool,
}

/// Whether to ask for batches. The permission for them (`secretsmanager:BatchGetSecretValue`) is one of its own, which a
/// role that may read every secret can lack.
#[derive(Debug, Default)]
pub(super) struct Batches(Mutex<Forbidden>);

#[derive(Debug, Default)]
struct Forbidden {
    until: Option<Duration>,
    /// Whether it was said since batches were last permitted.
    told: bool,
}

impl Batches {
    fn are_worth_asking_for(&self, now: Duration) -> bool {
        self.state().until.is_none_or(|until| now >= until)
    }

    fn are_permitted(&self) {
        *self.state() = Forbidden::default();
    }

    fn are_forbidden(&self, environment: &EnvironmentName, now: Duration) {
        let mut state = self.state();
        state.until = Some(now + FORBIDDEN_FOR);
        if !std::mem::replace(&mut state.told, true) {
            tracing::warn!(
                %environment,
                "AWS does not permit secretsmanager:BatchGetSecretValue, so secrets are fetched one by one, at up to \
                 twenty times the calls; permit it to the broker's role"
            );
        }
    }

    /// A panic under the lock leaves either state whole.
    fn state(&self) -> MutexGuard<'_, Forbidden> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sorts a page's values and errors to who asked for them; says where the next page starts.
fn take_page<'a>(
    page: BatchGetSecretValueOutput,
    asked: &HashMap<String, &'a Item>,
    answers: &mut HashMap<&'a Item, Answered>,
) -> Option<String> {
    for value in page.secret_values.unwrap_or_default() {
        let answer = Answer::from(value);
        if let Some((name, item)) = answer.name.as_ref().and_then(|name| asked.get_key_value(name)) {
            let answer = answer.about(&item.0, name);
            if answer.as_ref().is_ok_and(|found| found.version.labels.contains(&Label::Current)) {
                answers.insert(*item, answer);
            }
        }
    }
    for error in page.errors.unwrap_or_default() {
        if let Some((item, error)) = item_error(&error, asked) {
            answers.insert(item, Err(error));
        }
    }
    page.next_token.filter(|token| !token.is_empty())
}

fn item_error<'a>(error: &ApiErrorType, asked: &HashMap<String, &'a Item>) -> Option<(&'a Item, StoreError)> {
    let item = *asked.get(error.secret_id()?)?;
    let failure = Failure::of_code(error.error_code(), error.message(), None);
    if failure.leaves_open_what_is_missing() {
        return None;
    }
    Some((item, failure.about(&item.0, Some(&item.1))))
}

/// A failure of the whole call is every item's, unless asking one by one may do better: the permission for batches is
/// one of its own, so is their quota, and one secret's state can fail a batch.
fn take_failure<'a>(
    failure: &Failure,
    asked: &HashMap<String, &'a Item>,
    answers: &mut HashMap<&'a Item, Answered>,
) {
    let hopeless =
        matches!(failure.kind, Kind::Throttled | Kind::Unavailable | Kind::Unauthenticated | Kind::Limit);
    if hopeless && !failure.is_held_back {
        for item in asked.values() {
            answers.entry(*item).or_insert_with(|| Err(failure.clone().about(&item.0, Some(&item.1))));
        }
    }
}

/// Awaits them all, a few at a time; the answers are in the order of the calls.
async fn at_once<F: Future>(calls: Vec<F>) -> Vec<F::Output> {
    stream::iter(calls).buffered(AT_ONCE).collect().await
}

/// INVARIANT: every item was either answered for by a batch or fetched alone.
fn answered(answers: &HashMap<&Item, Answered>, item: &Item) -> Answered {
    answers.get(item).cloned().unwrap_or_else(|| Err(malformed(&item.0, "this secret")))
}

/// What `GetSecretValue` and `BatchGetSecretValue` have in common.
struct Answer {
    name: Option<String>,
    version_id: Option<String>,
    stages: Vec<String>,
    created: Option<DateTime>,
    text: Option<String>,
    binary: Option<Blob>,
}

impl From<GetSecretValueOutput> for Answer {
    fn from(answer: GetSecretValueOutput) -> Self {
        Self {
            name: answer.name,
            version_id: answer.version_id,
            stages: answer.version_stages.unwrap_or_default(),
            created: answer.created_date,
            text: answer.secret_string,
            binary: answer.secret_binary,
        }
    }
}

impl From<SecretValueEntry> for Answer {
    fn from(entry: SecretValueEntry) -> Self {
        Self {
            name: entry.name,
            version_id: entry.version_id,
            stages: entry.version_stages.unwrap_or_default(),
            created: entry.created_date,
            text: entry.secret_string,
            binary: entry.secret_binary,
        }
    }
}

impl Answer {
    /// Checks that the answer is about who was asked for: AWS takes a name that ends in a hyphen and six characters
    /// for another secret's partial ARN (AWS Secrets Manager user guide, "Finding a secret from a partial ARN").
    fn about(self, id: &SecretId, name: &str) -> Answered {
        // First, so that the value wipes itself whatever is wrong with the rest.
        let value = match (self.text, self.binary) {
            (Some(text), _) => SecretValue::text(text)?,
            (None, Some(binary)) => SecretValue::binary(binary.into_inner())?,
            (None, None) => return Err(malformed(id, "its value")),
        };
        if self.name.as_deref() != Some(name) {
            return Err(StoreError::SecretNotFound(id.clone()));
        }
        let version = Version {
            id: version_id(id, self.version_id)?,
            labels: labels(&self.stages),
            created_at: timestamp(self.created).ok_or_else(|| malformed(id, "the version's date"))?,
        };
        Ok(Fetched {
            version,
            value,
            order: Order::Unknown,
            source: Source::Store,
            age: Duration::ZERO,
            stale: false,
        })
    }
}

fn version_id(id: &SecretId, text: Option<String>) -> Result<VersionId, StoreError> {
    let text = text.ok_or_else(|| malformed(id, "the version id"))?;
    VersionId::parse(&text).map_err(|error| StoreError::Invalid(format!("secret `{}`: {error}", id.name)))
}

/// Labels that other writers made beyond this program's grammar are not shown.
pub(super) fn labels(stages: &[String]) -> Vec<Label> {
    let mut labels: Vec<Label> = stages.iter().filter_map(|stage| Label::parse(stage).ok()).collect();
    labels.sort();
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned};
    use crate::secret::ContentType;

    const NAME: &str = "production/database";

    fn id() -> SecretId {
        SecretId::parse("production", "database").unwrap()
    }

    fn answer(text: Option<&str>, binary: Option<&[u8]>) -> Answer {
        Answer {
            name: Some(NAME.to_owned()),
            version_id: Some("v".repeat(32)),
            stages: vec!["zeta".to_owned(), "AWSCURRENT".to_owned(), "not a label".to_owned()],
            created: Some(DateTime::from_millis(1_569_534_789_046)),
            text: text.map(ToOwned::to_owned),
            binary: binary.map(Blob::new),
        }
    }

    fn asked(items: &[Item]) -> HashMap<String, &Item> {
        items.iter().map(|item| (format!("production/{}", item.0.name), item)).collect()
    }

    #[test]
    fn an_answer_becomes_a_version_with_its_value() {
        let found = answer(Some("hunter2"), None).about(&id(), NAME).unwrap();
        assert_eq!(found.value.expose_text(), Some("hunter2"));
        assert_eq!(found.version.labels, [Label::Current, Label::parse("zeta").unwrap()]);
        assert_eq!((found.order, found.source, found.stale), (Order::Unknown, Source::Store, false));
        let found = answer(None, Some(&[0, 255])).about(&id(), NAME).unwrap();
        assert_eq!((found.value.content_type(), found.value.expose()), (ContentType::Binary, &[0, 255][..]));
    }

    #[test]
    fn an_answer_about_another_secret_is_none() {
        let mut other = answer(Some("hunter2"), None);
        other.name = Some("production/database-AbCdEf".to_owned());
        assert_eq!(other.about(&id(), NAME).unwrap_err().reason(), Reason::SecretNotFound);
    }

    #[test]
    fn an_answer_that_lacks_something_is_an_outage() {
        let no_value = answer(None, None);
        let no_id = Answer { version_id: None, ..answer(Some("x"), None) };
        let no_date = Answer { created: None, ..answer(Some("x"), None) };
        for answer in [no_value, no_id, no_date] {
            assert!(answer.about(&id(), NAME).unwrap_err().is_transient());
        }
    }

    #[test]
    fn a_page_is_sorted_by_name_and_what_is_not_current_is_left_for_later() {
        let items: Vec<Item> = ["a", "b", "c", "d"]
            .map(|name| (SecretId::parse("production", name).unwrap(), Selector::CURRENT))
            .into();
        let asked = asked(&items);
        let entry = |name: &str, stage: &str| {
            SecretValueEntry::builder()
                .name(format!("production/{name}"))
                .version_id("v".repeat(32))
                .version_stages(stage)
                .created_date(DateTime::from_secs(1))
                .secret_string(name)
                .build()
        };
        let denied =
            ApiErrorType::builder().secret_id("production/c").error_code("AccessDeniedException").build();
        let page = BatchGetSecretValueOutput::builder()
            .secret_values(entry("b", "AWSCURRENT"))
            .secret_values(entry("stranger", "AWSCURRENT"))
            .secret_values(entry("a", "AWSPREVIOUS"))
            .errors(denied)
            .next_token("")
            .build();
        let mut answers = HashMap::new();
        assert_eq!(take_page(page, &asked, &mut answers), None);
        assert_eq!(answers.len(), 2);
        assert_eq!(answered(&answers, &items[1]).unwrap().value.expose_text(), Some("b"));
        assert_eq!(answered(&answers, &items[2]).unwrap_err().reason(), Reason::StoreDenied);
    }

    #[test]
    fn forbidden_batches_are_tried_again_after_a_while() {
        let batches = Batches::default();
        let (now, environment) = (Duration::from_secs(1_000), id().environment);
        assert!(batches.are_worth_asking_for(now));
        batches.are_forbidden(&environment, now);
        assert!(!batches.are_worth_asking_for(now + FORBIDDEN_FOR - Duration::from_millis(1)));
        assert!(batches.are_worth_asking_for(now + FORBIDDEN_FOR));
        assert!(batches.state().told, "once, however often it is found out again");
        batches.are_permitted();
        assert!(batches.are_worth_asking_for(now) && !batches.state().told);
    }

    #[test]
    fn only_what_asking_again_would_not_mend_fails_every_item() {
        let items = [(id(), Selector::CURRENT)];
        let asked = asked(&items);
        for (code, fails_all) in
            [("ThrottlingException", true), ("ExpiredTokenException", true), ("AccessDeniedException", false)]
        {
            let mut answers = HashMap::new();
            take_failure(&Failure::of_code(Some(code), None, Some(400)), &asked, &mut answers);
            assert_eq!(!answers.is_empty(), fails_all, "{code}");
        }
    }
}
