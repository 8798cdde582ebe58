//! `/v1/servers/actions/{verb}`: one action on every server with some labels.
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use host::Answer;
use model::server::{BulkActions, ServerAction, StopServer};
use serde::Deserialize;
use tokio::time::Instant;
use utoipa::IntoParams;

use super::servers::Nothing;
use crate::answer;
use crate::call::{Mutation, Optional};
use crate::error::Failure;
use crate::query::{Query, check_selector};
use crate::routes::Api;

/// Which servers.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Selection {
    /// Comma-separated terms that must all hold: `key=value`, `key!=value`, `key`, `!key`. It may match 200 servers.
    #[param(
        pattern = "^(!?[A-Za-z0-9._/-]{1,63}|[A-Za-z0-9._/-]{1,63}!?=[A-Za-z0-9._/-]{0,63})(,(!?[A-Za-z0-9._/-]{1,63}|[A-Za-z0-9._/-]{1,63}!?=[A-Za-z0-9._/-]{0,63})){0,31}$"
    )]
    label_selector: String,
}

macro_rules! actions {
    ($($name:ident, $body:ty, $doc:literal, |$given:ident| $action:expr;)*) => {$(
        #[doc = $doc]
        ///
        /// All are decided in one transaction. A server that refuses has its problem in the answer and does not keep
        /// the others from it.
        #[utoipa::path(post, path = concat!("/v1/servers/actions/", stringify!($name)), tag = "servers",
            operation_id = concat!(stringify!($name), "_servers"), params(Selection),
            request_body = Option<$body>,
            responses(
                (status = 200, description = "With `Prefer: wait`: every operation has ended.", body = BulkActions),
                (status = 202, description = "The operation of each server, or why it has none.", body = BulkActions),
            ))]
        pub(crate) async fn $name(
            State(api): State<Api>,
            Query(selection): Query<Selection>,
            mutation: Mutation<Optional<$body>>,
        ) -> Result<Response, Failure> {
            let Mutation { call, body: Optional($given), wait } = mutation;
            check_selector(&selection.label_selector)?;
            let host = api.host.clone();
            let asked = answer::undisturbed(async move {
                Ok(host.servers().act_on_all(&call, selection.label_selector, $action).await?)
            })
            .await?;
            answered(&api, asked, wait).await
        }
    )*};
}

actions! {
    start, Nothing, "Starts every server with these labels.", |_given| ServerAction::Start;
    stop, StopServer, "Stops every server with these labels.", |given| ServerAction::Stop(given);
    reboot, StopServer, "Reboots every server with these labels.", |given| ServerAction::Reboot(given);
    pause, Nothing, "Pauses every server with these labels.", |_given| ServerAction::Pause;
    resume, Nothing, "Lets every paused server with these labels run again.", |_given| ServerAction::Resume;
    hibernate, Nothing, "Hibernates every server with these labels.", |_given| ServerAction::Hibernate;
}

/// With `wait`, answers 200 with every operation's end if all come in time; the work goes on by itself, so one wait
/// after the other takes as long as the longest.
pub(crate) async fn answered(
    api: &Api,
    mut answer: Answer<BulkActions>,
    wait: Option<Duration>,
) -> Result<Response, Failure> {
    let Some(wait) = wait else { return answer::decided(&answer, StatusCode::ACCEPTED, None) };
    let deadline = Instant::now() + wait;
    let mut all_ended = true;
    for operation in answer.body.items.iter_mut().filter_map(|item| item.operation.as_mut()) {
        let rest = deadline.saturating_duration_since(Instant::now());
        // The changes are made, so whatever is in the way of waiting must not look as if they were not.
        if let Ok(latest) = api.wait_for(operation.id, Some(rest)).await {
            *operation = latest;
        }
        all_ended &= operation.state.is_final();
    }
    match all_ended {
        true => answer::decided(&answer, StatusCode::OK, Some(wait)),
        false => answer::decided(&answer, StatusCode::ACCEPTED, None),
    }
}
