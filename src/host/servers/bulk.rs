//! One action on every server that a selector matches, decided for all of them in one transaction: a daemon that dies
//! has asked each of them or none, and a repeated call with the same key finds out which. `servers` does the work.
use model::page::{ListQuery, Page};
use model::server::{BulkAction, BulkActions, ServerAction};
use model::{Code, limits as bounds};

use super::record::ServerRecord;
use super::{Servers, ask_one, asked};
use crate::call::{Answer, Call};
use crate::error::{Error, Result};
use crate::store::{Tx, records, selector};

impl Servers {
    /// Asks every server with these labels for an action, as [`Servers::act`] does one. A server that refuses does
    /// not keep the others from it. Fails with `invalid_request` on `label_selector` when that has no term or matches
    /// more servers than [`bounds::BULK_SERVERS_MAX`]; then none is asked.
    pub async fn act_on_all(
        &self,
        call: &Call,
        label_selector: String,
        action: ServerAction,
    ) -> Result<Answer<BulkActions>> {
        let (ask, verb) = (asked(action)?, verb(action));
        let (workshop, caller) = (self.workshop().clone(), call.clone());
        let ask_all = move |tx: &Tx<'_>| {
            let mut items = Vec::new();
            for record in matched(tx, label_selector)? {
                let (server_id, name) = (record.id, record.name.clone());
                let outcome = tx.attempt(|| ask_one(tx, &workshop, record, ask, &caller.actor))?;
                let (operation, problem) = match outcome {
                    Ok((operation, _)) => (Some(operation), None),
                    Err(cause) => {
                        let instance = format!("/v1/servers/{server_id}/actions/{verb}");
                        (None, Some(cause.to_problem(&instance, &caller.request_id)))
                    }
                };
                items.push(BulkAction { server_id, name, operation, problem });
            }
            Ok(BulkActions { items })
        };
        let answer = self.workshop().core.mutate(call, ask_all).await?;
        if !answer.replayed {
            answer.body.items.iter().for_each(|item| self.wake(item.server_id));
        }
        Ok(answer)
    }
}

fn matched(tx: &Tx<'_>, label_selector: String) -> Result<Vec<ServerRecord>> {
    let refused = |code: &str, detail: String| Error {
        code: Code::InvalidRequest,
        ..Error::invalid("label_selector", code, detail)
    };
    if selector::parse(&label_selector).is_ok_and(|terms| terms.is_empty()) {
        return Err(refused("empty", "say which servers; an empty selector would be all of them".to_owned()));
    }
    let most = bounds::BULK_SERVERS_MAX;
    let query = ListQuery { limit: Some(most), label_selector: Some(label_selector), ..ListQuery::default() };
    let page: Page<ServerRecord> = records::page(tx, &query)?;
    if page.next_cursor.is_some() {
        let detail = format!("it matches more than {most} servers; add terms until it matches fewer");
        return Err(refused("too_many", detail));
    }
    Ok(page.items)
}

fn verb(action: ServerAction) -> &'static str {
    match action {
        ServerAction::Start => "start",
        ServerAction::Stop(_) => "stop",
        ServerAction::Reboot(_) => "reboot",
        ServerAction::Pause => "pause",
        ServerAction::Resume => "resume",
        ServerAction::Hibernate => "hibernate",
        ServerAction::SettleMemory => "settle-memory",
        ServerAction::UpgradeVmm => "upgrade-vmm",
    }
}
