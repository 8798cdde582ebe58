//! What a starting daemon does for one server: finds its VMM again, or finds out how it ended.
//! It changes nothing but what the daemon holds in memory, and gives up a save that nobody wants; the lifecycle decides what follows.
use super::effects;
use super::lifecycle::{End, Event, Found};
use super::record::ServerRecord;
use super::registry::{Entry, Workshop};
use super::{limits, saved};
use crate::error::Result;
use crate::store::records;
use crate::vmms::link::AskError;

/// Looks for the machine of a phase that has one. Nothing for other phases.
pub(super) async fn look(workshop: &Workshop, entry: &Entry, record: &ServerRecord) -> Result<Option<Event>> {
    let Some(vmm) = record.life.phase.vmm() else { return Ok(None) };
    let Some(process) = workshop.launcher.adopt(vmm)? else {
        let now_ms = record.context().now_ms;
        let end = match workshop.launcher.boot_id() {
            Ok(boot_id) if boot_id != vmm.boot_id => End::host_restarted(now_ms),
            _ => effects::end_of(workshop, record.id, record.cage(), None).await,
        };
        tracing::info!(server = %record.id, "its machine has ended meanwhile: {}", end.detail);
        return Ok(Some(Event::Found(Found::Gone(end))));
    };
    entry.hold(process, record.cage());
    let found = match entry.greet(limits::COMMAND).await {
        Ok((_, Some(hello))) => {
            entry.console.send_replace(hello.console_written);
            // The daemon may have died between the record of new limits and the VMM's word of them. Somebody may have recorded newer ones.
            let id = record.id.0;
            let latest = workshop.core.store.glance(move |connection| records::find(connection, id)).await?;
            if let Some(latest) = latest
                && let Err(cause) = entry.limit(&latest).await
            {
                tracing::warn!(server = %record.id, "its limits are not in force: {cause}");
            }
            saved::give_up_unwanted(workshop, entry, record).await;
            Found::Alive(hello.state)
        }
        Ok((_, None)) | Err(AskError::Gone | AskError::Timeout(_)) => Found::Mute,
        Err(cause) => {
            tracing::warn!(server = %record.id, "its VMM does not greet: {cause}");
            Found::Mute
        }
    };
    tracing::info!(server = %record.id, "adopted its machine: {found:?}");
    Ok(Some(Event::Found(found)))
}
